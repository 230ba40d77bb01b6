"""``python train.py experiment=tfno_darcy optimizer.lr=1e-3`` trains a model; ``--help`` lists what there is."""

import sys
from pathlib import Path

from torchlayers.training.cli import main

if __name__ == "__main__":
    sys.exit(main(config_dir=Path(__file__).parent / "configs"))
