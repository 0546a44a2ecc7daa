"""The prepare command's words -> what is wrong with them, in one line and with exit code 2. Nothing is written.

python -m diffusion_data.check_options recipe=media_caption source.path=rows/ output_dir=/shared/dataset

It takes seconds, in one process and without a GPU. So it goes before a start of many ranks, which torchrun would start
again and again for the same mistake: scripts/prepare.sbatch begins with it.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.distributed import Ranks
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.prepare_energon_dataset import main
from diffusion_data.prepare_job import open_source
from diffusion_data.process_func_options import row_decoder
from diffusion_data.run_folder import RunFolder
from diffusion_data.t5_files import files_of_t5, find_t5


def check_options(config: PrepareConfig) -> None:
    """What can be known before models compute and rows are read. Models that are not here yet are fetched.

    Raises:
        UserError: source, columns, process function, media, output folder, device, or models
    """
    ranks, tokenizer, text_encoder = Ranks.alone(), config.tokenizer, config.text_encoder
    ranks.device(config.device)
    with closing(open_source(config, ranks)):
        RunFolder(Path(config.output_dir)).check()
    cosmos = CosmosTokenizer.from_pretrained(
        tokenizer.name, tokenizer.cache_dir, dtype=tokenizer.torch_dtype, decoder=False
    )
    row_decoder(config, cosmos)
    files_of_t5(text_encoder.name, find_t5(text_encoder.name, text_encoder.cache_dir))


if __name__ == "__main__":
    main(check_options)
