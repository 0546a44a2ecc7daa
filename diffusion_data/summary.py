"""What a finished job tells its user: totals, rate, how busy each stage was, who waited for whom."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_data.counted import counted
from diffusion_data.errors import Reason
from diffusion_data.finish import Totals, format_reasons
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.stage_times import WAITS


def summary(config: PrepareConfig, totals: Totals, rows_now: int, phase_seconds: dict[str, float]) -> str:
    """The lines to print.

    rows_now: encoded by this start of the job; others were there already
    phase_seconds: of this start: "start up", "encode", "finish"
    """
    lines = [
        f"{config.output_dir}: {totals.rows} rows = {totals.written} written "
        f"+ {sum(totals.rejected.values())} rejected",
        f"  {counted(totals.samples, 'sample')} in {counted(totals.shards, 'shard')}, {totals.num_bytes / 1e6:.1f} MB; "
        + ", ".join(f"{name} {count}" for name, count in totals.splits.items() if count),
    ]
    if totals.rejected:
        retry = any(Reason(reason).retryable for reason in totals.rejected)
        lines.append(
            f"  rejected: {format_reasons(totals.rejected)}; each in run/rejected.jsonl"
            + ("; retry_rejected=network tries again what the network failed" if retry else "")
        )
    if totals.captions_cut:
        lines.append(f"  {counted(totals.captions_cut, 'caption')} cut to {config.text_encoder.max_length} tokens")
    lines += left_out_lines(totals.left_out)
    if totals.batches_halved:
        lines.append(
            f"  {totals.batches_halved} batches were halved for lack of memory: lower batching.pixels_per_batch "
            "or batching.tokens_per_batch"
        )
    lines += _times(totals, rows_now, phase_seconds)
    if config.tokenizer.name.startswith("tiny-") or config.text_encoder.name.startswith("tiny-"):
        lines.append("  made with the bundled tiny models, which are for trying out: name real ones to train on it")
    lines.append(f"  train: python scripts/train.py data.path={config.output_dir}")
    return "\n".join(lines)


def left_out_lines(left_out: Mapping[str, float]) -> list[str]:
    """What of videos is in no sample, if anything; left_out: the fields of LeftOut."""
    told = []
    if left_out.get("seconds_left_out"):
        seconds = left_out["seconds_kept"] + left_out["seconds_left_out"]
        told.append(f"{left_out['seconds_left_out']:.1f} of {seconds:.1f} s")
    if left_out.get("clips_dropped"):
        told.append(f"{counted(left_out['clips_dropped'], 'clip')} too short")
    if left_out.get("frames_cut"):
        told.append(f"{counted(left_out['frames_cut'], 'frame')} cut to lengths that are allowed")
    return [f"  left out of videos: {', '.join(told)}"] if told else []


def _times(totals: Totals, rows_now: int, phase_seconds: dict[str, float]) -> list[str]:
    encode = phase_seconds["encode"]
    others = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in phase_seconds.items() if phase != "encode")
    rate = f" ({rows_now / encode:.1f} rows/s)" if rows_now else ""
    seconds = totals.stage_seconds
    busy = ", ".join(f"{stage} {seconds[stage]:.1f} s" for stage in seconds if stage not in WAITS)
    waited = ", ".join(f"for {what} {seconds.get(stage, 0):.1f} s" for stage, what in WAITS.items())
    return [
        f"  {rows_now} rows in {encode:.1f} s{rate}; {others}",
        f"  busy, summed over ranks: {busy}",
        f"  ranks waited: {waited}",
    ]
