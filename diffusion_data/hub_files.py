"""Name of a model on the Hugging Face hub -> a local folder with its files.

The cache comes first: a resumed run gets the weights that it began with, and works without network. What is
missing is fetched by file, all from one commit. Whatever goes wrong is one line that says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusion_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WantedFiles:
    """What a kind of model consists of.

    choose: names of a repository's files -> those to fetch; empty where there is no such model
    is_complete: whether a folder has all that loading takes
    """

    kind: str
    looked_for: str
    choose: Callable[[Collection[str]], list[str]]
    is_complete: Callable[[Path], bool]


def model_folder(repo: str, wanted: WantedFiles, cache_dir: str | Path | None = None) -> Path:
    """The folder, in cache_dir (the hub's default without one), that has the wanted files of `owner/model`.

    Raises:
        UserError: no such repository, no access, no network, or other files.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _told_in_one_line(repo, wanted, cache_dir):
        cached = _cached_folder(repo, cache_dir)
        if cached is not None and wanted.is_complete(cached):
            return cached
        files = wanted.choose(HfApi().list_repo_files(repo))
        if files:
            folder = Path(snapshot_download(repo, cache_dir=cache_dir, allow_patterns=files))
            if wanted.is_complete(folder):
                return folder
    raise UserError(f"no {wanted.kind} in {_page(repo)}: {wanted.looked_for}")


def _cached_folder(repo: str, cache_dir: str | Path | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # asks for no file, because for files the answer depends on the version of the hub's library
        return Path(snapshot_download(repo, cache_dir=cache_dir, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


@contextmanager
def _told_in_one_line(repo: str, wanted: WantedFiles, cache_dir: str | Path | None) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{wanted.kind} {repo!r} is neither a folder nor a possible name on the hub") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{wanted.kind} {repo} is locked: accept its terms at {_page(repo)}, then hf auth login (or set HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no such {wanted.kind}: {repo} is neither a folder nor on the hub ({_page(repo)}; a private one needs "
            f"hf auth login, or HF_TOKEN); {wanted.looked_for}"
        ) from error
    # HTTPError is the base of the hub's HTTP client, which differs between versions of the hub's library
    except (errors.HTTPError, OSError) as error:
        raise UserError(
            f"can't fetch the {wanted.kind} {repo} from the hub ({_cause(error)}): check the network, or give a "
            f"folder that has its files, or a cache_dir that has them already (not {cache_dir or 'the default one'}); "
            f"{wanted.looked_for}"
        ) from error


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def _cause(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200].rstrip('.')}"
