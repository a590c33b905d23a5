"""The results as Markdown: targets first, what missed them, then every table, folded."""

import math

from .._cases import DTYPES, LAYERS, shape_of
from .._report import environment, of_all, table, targets
from ._cases import (
    LAYER_WORKS,
    LIBRARIES,
    LIBRARY_NAMES,
    MODELS,
    NO_NORM,
    PALLAS,
    PLATFORMS,
    SPLIT_OVER,
    SPLIT_ROWS,
    SPLITS,
    Case,
    layers_of,
)
from ._targets import by_case, outcomes, ratio


def report(*runs: dict) -> str:
    """All tables that the runs have rows for: section by section, and in each run by run."""
    found = {name(results): _sections(results) for results in runs}
    longest_first = sorted(found.values(), key=len, reverse=True)
    headings = dict.fromkeys(heading for parts in longest_first for heading in parts)
    return "\n\n".join(of_all(heading, found) for heading in headings) + "\n"


def name(results: dict) -> str:
    return f"jax {results['environment']['versions']['jax']}"


def _sections(results: dict) -> dict[str, str]:
    """What stands below each heading; the first has none."""
    layers, models = by_case(results["layers"]), by_case(results["models"])
    parts = [targets(outcomes(results))]
    for platform in PLATFORMS:
        parts += [_layers(layers, platform), _costs(models, platform), _sizes(models, platform)]
    parts += [_collectives(results["collectives"]), _failed(results["failed"])]
    return {"": environment(results)} | dict(part.split("\n\n", 1) for part in parts if part)


def _rows(found: dict[Case, dict], platform: str, order: dict[str, str]) -> list[Case]:
    """The cases of one platform, as if all were ours, in the order of the tables."""
    rows = {c._replace(library="ours") for c in found if c.platform == platform and c.layer}
    works = list(order)
    place = lambda c: (works.index(c.work), LAYERS.index(c.layer), DTYPES.index(c.dtype), c.shape)
    return sorted(rows, key=place)


def _unit(platform: str) -> tuple[int, str]:
    return (1, "bytes an element") if platform == "h100" else (1000, "cycles for 1000 elements")


def _layers(found: dict[Case, dict], platform: str) -> str:
    rows = _rows(found, platform, LAYER_WORKS)
    shapes = sorted({case.rows for case in rows}, key=lambda rows: shape_of(rows)[::-1])
    scale, unit = _unit(platform)
    lines = []
    for row in dict.fromkeys(case._replace(rows="") for case in rows):
        for library in LIBRARIES:
            cells = [found.get(row._replace(library=library, rows=shape)) for shape in shapes]
            head = [LAYER_WORKS[row.work], row.layer, row.dtype, LIBRARY_NAMES[library]]
            lines += [head + [_layer(cell, scale) for cell in cells]] if any(cells) else []
    head = ["", "", "dtype", "", *shapes]
    return _titled(f"{PLATFORMS[platform]}, one layer: {unit} (kernels)", head, lines)


def _layer(row: dict | None, scale: int) -> str:
    if row is None:
        return ""
    return f"{scale * row['cost'] / math.prod(shape_of(row['rows'])):.1f} ({row['kernels']})"


def _costs(found: dict[Case, dict], platform: str) -> str:
    """Bytes or cycles of the models, and ours over those of the others."""
    scale, unit = _unit(platform)
    libraries = _libraries(found, platform)
    pairs = [("ours", other) for other in libraries[1:] if other != PALLAS]
    pairs += [(PALLAS, "eqx")] if {PALLAS, "eqx"} <= set(libraries) else []
    lines = [
        [
            *_head(row),
            *(_model(found, row, library, "cost", scale) for library in libraries),
            *(_ratio(found, row._replace(library=one), other) for one, other in pairs),
        ]
        for row in _rows(found, platform, MODELS)
    ]
    ratios = [f"{LIBRARY_NAMES[one]} / {LIBRARY_NAMES[other]}" for one, other in pairs]
    head = ["", "", "dtype", *(LIBRARY_NAMES[library] for library in libraries), *ratios]
    return _titled(
        f"{PLATFORMS[platform]}, models: {unit} and layer (the norm's part)", head, lines
    )


def _sizes(found: dict[Case, dict], platform: str) -> str:
    """Temporaries and kernels of the models."""
    libraries = _libraries(found, platform)
    lines = [
        [
            *_head(row),
            *(_model(found, row, library, "temporaries", 1) for library in libraries),
            *(_model(found, row, library, "kernels") for library in libraries),
        ]
        for row in _rows(found, platform, MODELS)
    ]
    names = [LIBRARY_NAMES[library] for library in libraries]
    head = ["", "", "dtype", *names, *(f"{n}, kernels" for n in names)]
    title = "models: temporaries, bytes an element and layer; kernels (the norm's part)"
    return _titled(f"{PLATFORMS[platform]}, {title}", head, lines)


def _titled(title: str, head: list[str], lines: list[list[str]]) -> str:
    return f"## {title}\n\n{table(head, lines)}" if lines else ""


def _libraries(found: dict[Case, dict], platform: str) -> list[str]:
    there = {c.library for c in found if c.platform == platform}
    return [library for library in LIBRARIES if library in there | {"ours"}]


def _head(row: Case) -> list[str]:
    return [MODELS[row.work], row.layer, row.dtype]


def _model(found, row: Case, library: str, key: str, scale: int | None = None) -> str:
    """The whole program, and in brackets the norm's part; of each element and layer if scaled."""
    whole = found.get(row._replace(library=library))
    without = found.get(row._replace(library=NO_NORM, layer=""))
    if whole is None:
        return ""
    elements = math.prod(row.shape) * layers_of(row.work)
    figure = lambda n: f"{n}" if scale is None else f"{scale * n / elements:.1f}"
    part = f" ({figure(whole[key] - without[key])})" if without else ""
    return figure(whole[key]) + part


def _ratio(found, row: Case, library: str) -> str:
    whole, part = (ratio(found, row, "cost", library, part) for part in (False, True))
    return " ".join(
        text.format(value)
        for text, value in (("{:.2f}", whole), ("({:.2f})", part))
        if value is not None
    )


def _collectives(rows: list[dict]) -> str:
    of_row = lambda row: (
        list(PLATFORMS).index(row["platform"]),
        SPLITS.index(row["split"]),
        list(LIBRARY_NAMES).index(row["library"]),
    )
    lines = [
        [
            PLATFORMS[row["platform"]],
            row["split"],
            LIBRARY_NAMES[row["library"]],
            "; ".join(
                f"{count} {kind}, {size / 1024:.1f} KiB"
                for kind, (count, size) in row["collectives"].items()
            )
            or "none",
        ]
        for row in sorted(rows, key=of_row)
    ]
    title = f"Collectives of LayerNorm, {SPLIT_ROWS} split over {SPLIT_OVER} devices"
    head = ["", "split", "", "forward and backward, float32: how many, what they give to each"]
    return _titled(title, head, lines)


def _failed(rows: list[dict]) -> str:
    texts = [f"- {row['what']}: `{row['error']}`" for row in rows]
    return "## Failed\n\n" + "\n".join(texts) if texts else ""
