"""Import is free, and the offline and the online half share only what the design says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import diffusion_data

PACKAGE = Path(diffusion_data.__file__).parent
ONLINE = {
    "array_pickle",
    "batch_layout",
    "dataset_folder",
    "dataset_source",
    "diffusion_energon_datamodule",
    "diffusion_fake_datamodule",
    "diffusion_sample",
    "diffusion_stages",
    "diffusion_taskencoder",
    "energon_loaders",
    "epoch_length",
    "epoch_shuffle",
    "fake_latents",
    "fake_loader",
    "fake_shapes",
    "latent_datamodule",
    "latent_scaling",
    "late_reading",
    "lean_stages",
    "shared_batch",
    "loader_state",
    "open_loaders",
    "open_shards",
    "packed_layout",
    "packing",
    "parallel_ranks",
    "part_layouts",
    "pytest_plugin",
    "redistribution",
    "safe_decoder",
    "sample_filters",
    "sample_reader",
    "sequence_packing",
    "shard_check",
    "shard_reader",
    "shared_counts",
    "skip_counts",
    "testing",
    "text_conversion",
    "text_dropout",
    "training_stream",
}
LOOKING_BACK = {"report", "report_facts", "report_html", "report_sheet", "spread_samples"}
"""They read finished datasets, which takes the online half, and the models that made them."""
READ_BACK = {
    "finish": {"diffusion_energon_datamodule", "parallel_ranks"},
    "verify_dataset": {"dataset_folder", "shard_check"},
}
SHARED = {"assets", "command_line", "errors", "latent_sample", "patchify"}


def imports_of(module: str, everywhere: bool = True) -> set[str]:
    """Modules of this package that `module` imports: anywhere in it, or only when it is imported itself."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[1] for name in names if name.startswith("diffusion_data.")}


def modules() -> set[str]:
    return {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = """
import sys, diffusion_data
heavy = {"torch", "numpy", "megatron", "lightning", "transformers", "diffusers", "av", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_every_module_loads_no_model_device_or_process_group() -> None:
    names = sorted(modules() - ONLINE - LOOKING_BACK)
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module("diffusion_data." + name)
import torch
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
loaded = {{"megatron.energon", "lightning", "diffusers"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_had_from_the_package() -> None:
    for name in diffusion_data.__all__:
        assert getattr(diffusion_data, name).__name__ == name


def test_the_online_half_needs_nothing_of_the_offline_half() -> None:
    assert modules() >= ONLINE
    for module in ONLINE:
        assert imports_of(module) <= ONLINE | SHARED, module


def test_the_offline_half_needs_the_online_half_only_to_read_back_what_it_made() -> None:
    for module in modules() - ONLINE - LOOKING_BACK:
        used = imports_of(module) & ONLINE
        assert used == READ_BACK.get(module, set()), module
        assert not imports_of(module, everywhere=False) & ONLINE, module


def test_the_report_is_imported_only_when_the_job_is_done() -> None:
    for module in modules() - LOOKING_BACK:
        used = imports_of(module) & LOOKING_BACK
        if module == "job_report":
            assert used == {"report", "report_sheet"}
            assert not imports_of(module, everywhere=False) & LOOKING_BACK
        else:
            assert not used, module


def test_the_shared_modules_stand_on_their_own() -> None:
    for module in SHARED - {"assets"}:
        assert imports_of(module) <= SHARED, module
