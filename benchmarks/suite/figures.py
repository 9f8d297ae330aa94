"""The figures that targets and predictions speak of, out of the sections' raw results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h5traces.format.native import NATIVE
from suite.cases import conversion
from suite.cases.limits import COPY, INFLATE_ALL_CORES, INFLATE_CHUNKS, INFLATE_LEGACY
from suite.formats import GZIP_PICKLE, STOCK, STOCK_WHOLE
from suite.formats.h5traces_archive import archive_name, codecs
from suite.measure import Spread, ratio
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping

ONE, ALL = archive_name("gzip", threaded=False), archive_name("gzip", threaded=True)
# What the ratios are taken against, by the short names that figures have.
RIVALS: Final = {
    "legacy": GZIP_PICKLE,
    "stock": STOCK,
    "stock_whole": STOCK_WHOLE,
    "safetensors": "safetensors",
}
Sections = dict[str, Any]
_MOST_LARGER: Final = 1.03


def figures(sections: Sections) -> dict[str, Spread]:
    """Every figure that the sections that were run allow."""
    found: dict[str, Spread | None] = {}
    if "throughput" in sections:
        found |= _throughput(sections["throughput"])
        found |= _limits(sections["throughput"])
    if "real" in sections:
        real = _throughput(sections["real"])
        found |= {f"real_{name}": spread for name, spread in real.items()}
    if "opening" in sections:
        found |= _opening(sections["opening"])
    if "conversion" in sections:
        found |= _conversion(sections["conversion"])
    if "memory" in sections:
        found |= _memory(sections["memory"])
    if "growth" in sections:
        found |= _growth(sections["growth"])
    # Predictions differ for reading with compiled kernels and without.
    how = "native" if NATIVE is not None else "python"
    for name in ("scan_wall_vs_legacy", "real_scan_wall_vs_legacy"):
        found[f"{name}_{how}"] = found.get(name)
    return {name: spread for name, spread in found.items() if spread is not None}


def exactly(value: float) -> Spread:
    """A figure that does not vary."""
    return Spread(value, value, value)


def speed(series: Mapping[str, list[float]], name: str, nbytes: int) -> Spread | None:
    """Megabytes per second of a column of seconds."""
    if name not in series:
        return None
    return Spread.of([nbytes / each / 1e6 for each in series[name]])


def _throughput(section: Sections) -> dict[str, Spread | None]:
    series, stored = section["series"], section["stored"]
    found: dict[str, Spread | None] = {}
    for short, rival in RIVALS.items():
        if rival not in series:
            continue
        for what in ("write_wall", "write_cpu", "scan_wall", "scan_cpu", "random"):
            found[f"{what}_vs_{short}"] = ratio(series[rival], series[ALL], what)
            found[f"{what}_vs_{short}_1"] = ratio(series[rival], series[ONE], what)
        size = stored[ONE]["nbytes"] / stored[rival]["nbytes"]
        found[f"size_vs_{short}"] = exactly(size)
        found[f"smaller_than_{short}"] = exactly(100 * (1 - size))
    found |= _plugin_codec(section)
    kinds = section["kinds"][ONE]
    for kind in KINDS:
        bits = 8 * kinds[kind] / section["kind_values"][kind]
        found[f"{kind}_bits"] = exactly(bits)
        found[f"{kind}_vs_entropy"] = exactly(bits / section["floor"][kind])
    return found


def _plugin_codec(section: Sections) -> dict[str, Spread | None]:
    """The plugin codec that is read fastest of those at most 3 % larger than the default."""
    series, stored = section["series"], section["stored"]
    most = _MOST_LARGER * stored[ONE]["nbytes"]
    names = [codec for codec in codecs() if codec != "gzip"]
    found: dict[str, Spread | None] = {}
    for threaded, default, suffix in ((True, ALL, ""), (False, ONE, "_1")):
        rivals = [archive_name(codec, threaded=threaded) for codec in names]
        ratios = [
            ratio(series[default], series[rival], "scan_wall")
            for rival in rivals
            if rival in series and stored[rival]["nbytes"] <= most
        ]
        fastest = max(filter(None, ratios), key=lambda each: each.median, default=None)
        found[f"plugin_scan{suffix}"] = fastest
    return found


def _limits(section: Sections) -> dict[str, Spread | None]:
    """Speeds as shares of what memory and inflate allow, round by round."""
    series, nbytes = section["series"], section["payload_nbytes"]

    def share(name: str, what: str, limit: str) -> Spread | None:
        if limit not in series:
            return None  # of an older run
        pairs = zip(series[name][what], series[limit]["speed"], strict=True)
        return Spread.of([100 * nbytes / seconds / 1e6 / speed for seconds, speed in pairs])

    return {
        "copy_speed": Spread.of(series[COPY]["speed"]),
        "inflate_speed": Spread.of(series[INFLATE_LEGACY]["speed"]),
        "inflate_chunks_speed": Spread.of(series[INFLATE_CHUNKS]["speed"]),
        "read_1_of_inflate": share(ONE, "scan_wall", INFLATE_CHUNKS),
        "read_all_of_inflate": share(ALL, "scan_wall", INFLATE_ALL_CORES),
        "read_all_of_copy": share(ALL, "scan_wall", COPY),
        "write_all_of_copy": share(ALL, "write_wall", COPY),
    }


def _opening(section: Sections) -> dict[str, Spread | None]:
    series = section["series"]
    ours = series[ONE]
    found: dict[str, Spread | None] = {"open_ms": Spread.of([1e3 * s for s in ours["open_wall"]])}
    for short, rival in RIVALS.items():
        if rival in series:
            found[f"open_vs_{short}"] = ratio(series[rival], ours, "open_wall")
    return found


def _conversion(section: Sections) -> dict[str, Spread | None]:
    series = section["series"]

    def against(case: str, base: str) -> Spread | None:
        return ratio(series[case], series[base], "run_wall")

    return {
        "convert_gz": against(conversion.CONVERT_GZ, conversion.INFLATE),
        "convert_gz_verify": against(conversion.CONVERT_GZ_VERIFY, conversion.INFLATE),
        "convert_pkl": against(conversion.CONVERT_PKL, conversion.INFLATE),
        "convert_pkl_verify": against(conversion.CONVERT_PKL_VERIFY, conversion.INFLATE),
        "convert_gz_vs_load": against(conversion.CONVERT_GZ_VERIFY, conversion.LOAD_GZ),
        "one_layer": against(conversion.LOAD_GZ, conversion.ONE_LAYER),
        "load_all": against(conversion.LOAD_GZ, conversion.ALL_FROM_ARCHIVE),
        "safe_load": against(conversion.LOAD_GZ, conversion.SAFE_LOAD),
    }


def _memory(section: Sections) -> dict[str, Spread | None]:
    converts = {name: each for name, each in section["commands"].items() if "convert" in name}
    peak = max(each["peak"] - each["bare"] for each in converts.values())
    allowed = 200e6 + 2 * section["largest_sample_nbytes"]
    return {
        "convert_peak_mb": exactly(peak / 1e6),
        "convert_allowed_mb": exactly(allowed / 1e6),
        "convert_peak_share": exactly(peak / allowed),
    }


def _growth(section: Sections) -> dict[str, Spread | None]:
    """The largest archive against the smallest."""
    sizes = sorted(section["sizes"], key=int)
    first, last = (section["sizes"][each] for each in (sizes[0], sizes[-1]))
    grown = last["memory"][ONE]["peak"] - first["memory"][ONE]["peak"]
    return {
        "growth_open": ratio(last["series"][ONE], first["series"][ONE], "open_wall"),
        "growth_random": ratio(last["series"][ONE], first["series"][ONE], "random"),
        "growth_rss_mb": exactly(grown / 1e6),
    }
