"""Compares eqx_norms with what a user would pick instead: speed, bytes, compile time, accuracy.

python -m benchmarks            # everything, about a quarter of an hour on two cores
python -m benchmarks --quick    # a minute or two
python -m benchmarks --only speed --rival eqx,torch --rows 4096x768 --dtype bfloat16
"""

import argparse

from tqdm import tqdm

from ._cases import DTYPES, LAYERS, RIVALS, ROWS, SECTIONS, WORKS, is_installed, speed_cases
from ._child import child
from ._speed import speed


def options(argv):
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    some = lambda choices: dict(type=lambda text: _some(text, choices), default=list(choices))
    parser.add_argument("--only", help=", ".join(SECTIONS), **some(SECTIONS))
    parser.add_argument("--rival", help=", ".join(RIVALS), **some(RIVALS))
    parser.add_argument("--layer", help=", ".join(LAYERS), **some(LAYERS))
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS))
    parser.add_argument("--dtype", help=", ".join(DTYPES), **some(DTYPES))
    parser.add_argument("--work", help=", ".join(WORKS), **some(WORKS))
    parser.add_argument("--seconds", type=float, default=0.6)
    return parser.parse_args(argv)


def _some(text, choices):
    chosen = text.split(",")
    for one in chosen:
        if one not in choices:
            raise argparse.ArgumentTypeError(f"{one!r} is none of {', '.join(choices)}")
    return chosen


def main(argv=None):
    to = options(argv)
    for rival in filter(is_installed, to.rival):
        with child() as call:
            for case in tqdm(speed_cases(rival, to.layer, to.rows, to.dtype, to.work), rival):
                row = call(speed, rival, case, to.seconds)
                tqdm.write(
                    f"{case.layer:9} {case.rows:10} {case.dtype:8} {case.work:8} "
                    f"ours {row['ours_ms']:9.3f} ms, {rival:5} {row['rival_ms']:9.3f} ms, "
                    f"ours / {rival} {row['ratio']:.2f} {row['ratio_quartiles']} "
                    f"({row['rounds']} rounds)"
                )


if __name__ == "__main__":
    main()
