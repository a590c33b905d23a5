"""D: the data, names as pairs of three letters and the letter that follows them."""

import numpy as np

from ._plots import panels
from ._study import Result, Settings, fact, run


def study(settings: Settings) -> Result:
    _, letters, vocabulary = settings.pairs
    counts = np.bincount(letters, minlength=len(vocabulary))
    share = counts / counts.sum()
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))

    fig, ((ax,),) = panels(1, 1, 6, 2.4)
    ax.bar(list(vocabulary.symbols), share)
    ax.set(ylabel="share of next letters", title=f"{len(letters):,} pairs")
    settings.save(fig, "d_letters")

    numbers = {
        "names": settings.names,
        "pairs": len(letters),
        "symbols": len(vocabulary),
        "entropy of the next letter": entropy,
        "loss of a uniform guess": np.log(len(vocabulary)),
    }
    total = f"{len(letters):,}"
    claim = fact("D", "pairs", "186,339 + 433,815", total, len(letters) == 186_339 + 433_815)
    # Another list of names has another number of pairs, which is no failure.
    return Result(numbers, [claim if claim.holds == "yes" else claim._replace(holds="other data")])


if __name__ == "__main__":
    run(["d_data"], doc=__doc__)
