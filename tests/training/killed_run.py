"""Trains as a JSON config says and writes down which samples every step used; for tests that kill it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from llava_scale.config.load import parse_config
from llava_scale.training import trainer


def main(config_path: str, used_path: str) -> None:
    torch.set_num_threads(1)
    train_step = trainer.Trainer._train_step

    def watched(self, batch):
        with Path(used_path).open("a", encoding="utf-8") as file:
            keys = [list(row.keys) for row in batch.rows]
            file.write(json.dumps({"batch": batch.step, "keys": keys}) + "\n")
        train_step(self, batch)

    trainer.Trainer._train_step = watched
    config = parse_config(json.loads(Path(config_path).read_text(encoding="utf-8")), origin=config_path)
    trainer.train(config, resume=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
