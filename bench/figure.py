"""One of the paper's figures in a folder of your own: error and labels kept against stragglers.

    python bench/figure.py [NAME] [--logits] [--data-dir FOLDER] [--output FOLDER] [--steps 150]

NAME is a model at (N, K), as in "lenet5-mnist:100:20" (default). All codes of `paper.py` are
measured as there on probabilities (or logits), NeRCC, BACC and BSCC untuned and tuned, too. The
folder (default: figure) gets the picture, the numbers as JSON, and the tuned codes. Images come
from Hugging Face's hub, or from FOLDER/mnist/{train,test}.parquet.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console

_DEFAULT = "lenet5-mnist:100:20"


def main() -> None:
    options = _parse()
    console, start = Console(emoji=False), time.perf_counter()
    console.print(f"{options.name} into {options.output.resolve()}: loading JAX and the models ...")
    # Late: they take seconds, and the reader sees at once that something happens.
    import dataclasses

    import paper
    from _report import write_json

    settings = {setting.name: setting for setting in paper.SETTINGS}
    if options.name not in settings:
        raise SystemExit(f"{options.name} is none of {', '.join(settings)}")
    setting = settings[options.name]
    size = dataclasses.replace(paper.FULL, steps=options.steps)
    kinds = ("logits",) if options.logits else ("probabilities",)
    part = paper.run_setting(
        setting, size, options.data_dir, console, options.output, kinds=kinds, further=False
    )
    seconds = {"seconds": round(time.perf_counter() - start)}
    seconds |= {"cpu_seconds": round(time.process_time())}
    path = options.output / f"{setting.name.replace(':', '-')}.json"
    write_json(path, part | seconds)
    console.print(f"picture: {paper.draw(part, options.output, setting)}")
    console.print(f"numbers: {path}")
    console.print(f"{seconds['seconds']} s, {seconds['cpu_seconds']} s of CPU time")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("name", nargs="?", default=_DEFAULT, help=f"(default: {_DEFAULT})")
    parser.add_argument("--logits", action="store_true", help="in place of probabilities")
    parser.add_argument("--data-dir", type=Path, help="the folder with mnist (default: the hub)")
    parser.add_argument("--output", type=Path, default=Path("figure"), help="(default: figure)")
    parser.add_argument("--steps", type=int, default=150, help="of tuning (default: 150)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
