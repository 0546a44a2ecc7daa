"""Turn parquet rows of (image or video, caption) into a dataset that trains.

torchrun --nproc_per_node=8 scripts/prepare_energon_dataset.py recipe=butterflies text_encoder.cache_dir=/big/disk
python scripts/prepare_energon_dataset.py recipe=media_caption source.path=my.parquet output_dir=my_dataset
"""

from diffusion_data.prepare_energon_dataset import main

if __name__ == "__main__":
    main()
