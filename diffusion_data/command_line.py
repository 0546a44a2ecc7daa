"""Command line -> composed config -> job(config); trouble the user can mend ends as one line and exit code 2.

`run` is all that a script's main() calls. Set DIFFUSION_DATA_DEBUG=1 (or HYDRA_FULL_ERROR=1) for tracebacks.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, make_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_data.errors import UserError

T = TypeVar("T")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C

_SECONDS_FOR_RANK_0_TO_TELL = 5.0


def run(
    job: Callable[[DictConfig], None],
    config_name: str,
    hints: Mapping[str, str] | None = None,
    interrupted: str = "interrupted",
    open_options: Sequence[str] = (),
) -> None:
    """Composes configs/<config_name>.yaml with the command line's options and calls `job` with the result.

    hints: option -> what to give for it, told when a required option is missing.
    interrupted: told after Ctrl-C, or SIGTERM, which a scheduler sends.
    open_options: mappings whose keys are the user's own: OPTION.KEY=VALUE needs no + before it, as Hydra asks for, and
        OPTION={...} replaces what a config or experiment has there.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as after Ctrl-C
    debug = any(os.environ.get(name) == "1" for name in ("DIFFUSION_DATA_DEBUG", "HYDRA_FULL_ERROR"))
    try:
        for config in _compose(config_name, open_options):
            _require_options(config, hints or {})
            job(config)
    except UserError as error:
        _record_for_torchrun(str(error))
        if debug:
            raise
        _exit_with_one_line(str(error))
    except KeyboardInterrupt:
        if debug:
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{Path(sys.argv[0]).name}: {interrupted}", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        _record_for_torchrun(f"{type(error).__name__}: {error} (traceback above)")
        raise


def options_to_dataclass(kind: type[T], config: DictConfig | Mapping[str, Any], group: str) -> T:
    """A config group -> the dataclass that declares it, and those nested in it.

    Unknown, missing and wrongly typed options are errors that name them. group: "" for the whole config.
    """
    options = _plain(config)
    check_options(kind, options, group)
    types = get_type_hints(kind)
    values = {name: _typed(value, types[name], _join(group, name)) for name, value in options.items()}
    try:
        return kind(**values)
    except ValueError as error:  # from the dataclass's own checks
        raise UserError(f"{group}: {error}" if group else str(error)) from error


def build_target(config: DictConfig | Mapping[str, Any], group: str, **extra: Any) -> Any:
    """A config group with `_target_` -> what the target returns; groups nested in it are built first.

    Unlike Hydra's instantiate, it compares the options with the target's parameters before the call, so that a
    wrong option is named, and an error from inside the target keeps its own traceback.
    """
    options = _plain(config)
    target = locate(str(options.pop("_target_", "")), f"{group}._target_")
    check_options(target, {**options, **extra}, group)
    built = {
        name: build_target(value, f"{group}.{name}") if isinstance(value, dict) and "_target_" in value else value
        for name, value in options.items()
    }
    try:
        return target(**built, **extra)
    except ValueError as error:
        raise UserError(f"{group}: {error}") from error


def locate(dotted_name: str, option: str) -> Callable[..., Any]:
    """`package.module.function` (the value of `option`) -> the function or class."""
    module_name, _, attribute = dotted_name.rpartition(".")
    wrong = f"{option}={dotted_name}: no such function or class"
    try:
        module = import_module(module_name or "builtins")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise UserError(f"{wrong} (no module {error.name})") from error
    except ValueError as error:  # such as ".name"
        raise UserError(wrong) from error
    if not hasattr(module, attribute):
        raise UserError(f"{wrong} (module {module_name} has no {attribute})")
    found = getattr(module, attribute)
    if not callable(found):
        raise UserError(f"{option}={dotted_name} is not a function or class")
    return cast(Callable[..., Any], found)


def check_options(target: Callable[..., Any], options: Mapping[str, Any], group: str) -> None:
    """Raises UserError unless every option is a parameter of `target` and none that it requires is missing."""
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    for name in options:
        if name not in named and not takes_any:
            raise UserError(_unknown_option(_join(group, name), named))
    for name in named:
        if options.get(name, "???") == "???" and (name in options or parameters[name].default is Parameter.empty):
            raise UserError(f"missing option {_join(group, name)}: add {_join(group, name)}=VALUE")


def _compose(config_name: str, open_options: Sequence[str]) -> list[DictConfig]:
    """The configs that the command line asks for: one, several with --multirun, none with --help or --cfg."""
    import hydra
    from hydra.errors import HydraException

    composed: list[DictConfig] = []

    unresolved: list[OmegaConfBaseException] = []

    def keep(config: DictConfig) -> None:
        try:
            OmegaConf.resolve(config)  # while Hydra's own resolvers can answer
            composed.append(config)
        except OmegaConfBaseException as error:
            unresolved.append(error)

    # The job runs after Hydra has returned: no Hydra frames in its tracebacks, no line of Hydra's before its errors.
    keep.__module__ = config_name  # the name in --help
    decorate = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
    before, words = os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing
    sys.argv = [each for word in words for each in _opened(word, open_options)]
    try:
        decorate(keep)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    finally:
        sys.argv = words
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before
    if unresolved:
        raise UserError(_explain(unresolved[0])) from unresolved[0]
    return composed


def _opened(word: str, open_options: Sequence[str]) -> list[str]:
    """A word of the command line as Hydra has to be told it, if it sets an open option or a key in one."""
    option, assigns, _ = word.partition("=")
    if assigns and any(f"{option}.".startswith(f"{each}.") for each in open_options):
        return [f"++{option}=null", f"++{word}"]  # Hydra would merge a mapping into the one that is there
    return [word]


def config_folder() -> Path:
    """Where the package's own configs are: configs/ of a clone, diffusion_data/configs of an installed wheel."""
    import diffusion_data.configs

    return Path(next(iter(diffusion_data.configs.__path__))).resolve()


def _typed(value: Any, hint: Any, option: str) -> Any:
    """The value of an option, checked against and converted to its annotated type."""
    kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    if kinds and value is not None:
        if not isinstance(value, Mapping):
            raise UserError(f"{option}={value}: give the options in it: {option}.OPTION=VALUE")
        return options_to_dataclass(cast(type, kinds[0]), value, option)
    try:
        holder = OmegaConf.structured(make_dataclass("Holder", [("value", hint)]))
        holder.value = value
        converted = OmegaConf.to_container(holder, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{option}={value}: {_first_line(error)}") from error
    assert isinstance(converted, dict)
    is_tuple = tuple in (get_origin(hint), *map(get_origin, get_args(hint)))
    return tuple(converted["value"]) if is_tuple and value is not None else converted["value"]


def _plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True))


def _join(group: str, name: str) -> str:
    return f"{group}.{name}" if group else name


def _require_options(config: DictConfig, hints: Mapping[str, str]) -> None:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        told = [f"{name} ({hints[name]})" if name in hints else name for name in missing]
        raise UserError(f"missing option {', '.join(told)}: add {' '.join(f'{name}=VALUE' for name in missing)}")


def _explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages, many lines long -> what is wrong with which option, and what to do."""
    from hydra.errors import ConfigCompositionException, MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"no {group}={choice}; there are: {', '.join(error.options)} (--config-dir adds a folder of yours)"
    if unchosen := re.match(r"You must specify '(\w+)'.*?Available options:\s*(.*)", str(error), re.DOTALL):
        group, choices = unchosen[1], ", ".join(unchosen[2].split())
        return f"missing option {group}: add {group}=NAME; there are: {choices} (--config-dir adds a folder of yours)"
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        parent = cause.parent_node
        if cause.key is not None and isinstance(parent, DictConfig) and cause.key not in parent:
            return _unknown_option(str(cause.full_key or cause.key), [str(key) for key in parent])
        return f"{cause.full_key}: {_first_line(cause)}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(error)}"
    return str(error)


def _unknown_option(option: str, known: Sequence[str]) -> str:
    group, _, name = option.rpartition(".")
    known = [name for name in known if name not in ("_target_", "hydra")]
    close = get_close_matches(name, known, n=1)
    known_here = f"{f'{group} has' if group else 'there are'}: {', '.join(known)}"
    if close:
        return f"unknown option {option}: did you mean {f'{group}.' if group else ''}{close[0]}? ({known_here})"
    return f"unknown option {option}; {known_here}"


def _record_for_torchrun(message: str) -> None:
    """torchrun's summary of a failed run quotes this file, whose path it gives to each process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": _one_line(message), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": content}))


def _exit_with_one_line(message: str) -> NoReturn:
    rank = int(os.environ.get("RANK", 0))
    where = ""
    if rank > 0:
        # Most mistakes hit every rank. Rank 0 tells them; torchrun then ends the others before they repeat it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # silently: there is nothing to clean up any more
        time.sleep(_SECONDS_FOR_RANK_0_TO_TELL)
        where = f" rank {rank}:"
    print(f"{Path(sys.argv[0]).name}:{where} error: {_one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def _first_line(error: OmegaConfBaseException) -> str:
    """What is wrong, without the lines on OmegaConf's node types that follow."""
    return str(error).partition("\n")[0]


def _one_line(message: str) -> str:
    if "\nOriginal Traceback" in message:  # from a DataLoader's worker: the error itself is in the last lines
        message = message.rpartition(f"{UserError.__name__}: ")[2]
    return " ".join(message.split())
