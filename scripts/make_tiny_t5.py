"""A hand-written vocabulary -> the package's tiny T5 encoder and its tokenizer (transformers layout).

    python scripts/make_tiny_t5.py --output diffusion_data/assets/tiny_t5

A second on a CPU, and the same bytes each time. Embeddings are as wide as t5-11b's (1024), which is what
models expect. Nothing is trained: each word has a random vector of its own, and the one layer mixes in
those of its neighbours, so that "red" beside "circle" differs from "red" beside "square". That is all that
a small model needs to follow captions, and it is no understanding of language.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "diffusion_data" / "assets" / "tiny_t5"

SPECIAL = ("<pad>", "</s>", "<unk>")
WORD_START = "▁"
"""How SentencePiece writes the space before a word."""

_WORD_LINES = """
    a an and are at by from in into is it its no not of on over the their them to under with
    red green blue yellow orange purple pink brown black white grey cyan dark light pale small large
    circle square triangle diamond ring cross star shape background stripes checks dots stars hills sea
    sky night middle left right top bottom corner front fades moves rises falls grows shrinks turns
    stays still larger slowly around picture clip drawn photo video one two three first second
    A The that shapes largest edges sharp nothing else
    man woman person people child dog cat bird fish flower tree water house car street city hand face
"""
WORDS = _WORD_LINES.split()
ENDINGS = ("s", "es", "ed", "er", "ing", "ly", "al", "en", "ion", "st", "th", "ch", "sh", "ou", "ea")
CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + ".,;:!?'\"-()/&%+#"

# Relative positions are counted in buckets: 0 is the token itself, 1 the one before, 17 the one after.
BUCKETS = 32
HERE, BEFORE, AFTER = 0, 1, 17
HEADS = 4


def build_vocabulary() -> list[tuple[str, float]]:
    """(token, log probability) in id order; one token for a known word beats its characters."""
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary.append((WORD_START, -4.0))
    vocabulary += [(WORD_START + word, -4.0) for word in WORDS]
    vocabulary += [(ending, -6.0) for ending in ENDINGS]
    vocabulary += [(character, -8.0) for character in CHARACTERS]
    return vocabulary


def build_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=build_vocabulary(), extra_ids=0, model_max_length=512)


def build_model(vocabulary_size: int, seed: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=1024,
        d_ff=128,
        d_kv=16,
        num_heads=HEADS,
        num_layers=1,
        relative_attention_num_buckets=BUCKETS,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config).eval()
    fill(model, seed)
    return model.to(torch.bfloat16)


@torch.no_grad()
def fill(model: T5EncoderModel, seed: int) -> None:
    """Sets every weight from NumPy's generator, whose numbers don't change with torch or transformers."""
    rng = np.random.default_rng(seed)
    for name, weight in sorted(model.named_parameters()):
        if name.endswith("layer_norm.weight"):
            weight.fill_(1.0)
        elif name.endswith("relative_attention_bias.weight"):
            weight.copy_(neighbour_bias())
        else:
            values = torch.from_numpy(rng.standard_normal(weight.shape, dtype=np.float32))
            if name != "shared.weight":  # word vectors have unit variance, all else keeps it
                values /= weight.shape[1] ** 0.5
            if name.endswith("SelfAttention.q.weight"):
                values *= 0.1  # place decides what a token attends to, and meaning little
            weight.copy_(values)


def neighbour_bias() -> torch.Tensor:
    """(BUCKETS, HEADS): one head looks one token back, one ahead, one at both, one everywhere."""
    bias = torch.zeros(BUCKETS, HEADS)
    bias[BEFORE, 0] = 8.0
    bias[AFTER, 1] = 8.0
    bias[[HERE, BEFORE, BEFORE + 1, AFTER, AFTER + 1], 2] = 4.0
    return bias


def make(output: Path, seed: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(output)
    build_model(len(tokenizer), seed).save_pretrained(output)
    for file in output.iterdir():
        file.chmod(0o644)  # the weights come out readable by their owner alone


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the package's tiny T5 encoder.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    make(arguments.output, arguments.seed)
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{len(build_vocabulary())} tokens, {size / 1e6:.2f} MB written to {arguments.output}")


if __name__ == "__main__":
    main()
