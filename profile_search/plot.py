"""A picture of what was measured: agreement over ratio, codec time as colour, the front as a line. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError
from kv_transfer.profile import Profile
from profile_search.front import Judged

FRAME_BYTES = 2**20


def draw(judged: Sequence[Judged], profiles: Sequence[Profile], title: str, path: Path) -> None:
    """Write a PNG.

    Args:
        judged: all candidates that were judged on every prompt of the search.
        profiles: those of the library, as accepted on other prompts.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install 'tandem[profiles]'") from error
    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dots = axes.scatter(
        [item.one.cost.ratio for item in judged],
        [item.agreement for item in judged],
        c=[1e3 * item.one.cost.codec_s(FRAME_BYTES) for item in judged],
        cmap="viridis",
        s=18,
        label="candidates judged on all search prompts",
    )
    figure.colorbar(dots, ax=axes, label="encode + decode of 1 MiB, ms, one core")
    lossy = [profile for profile in profiles if profile.quality is not None]
    if lossy:
        found = sorted(lossy, key=lambda profile: profile.ratio)
        qualities = [profile.quality for profile in found if profile.quality is not None]
        ratios = [profile.ratio for profile in found]
        middle = [quality.agreement for quality in qualities]
        below = [quality.agreement - quality.agreement_low for quality in qualities]
        above = [quality.agreement_high - quality.agreement for quality in qualities]
        axes.errorbar(
            ratios, middle, yerr=[below, above], fmt="o-", color="tab:red", capsize=3, linewidth=1,
            label="library, on the acceptance prompts (95 % intervals)",
        )  # fmt: skip
        for profile, ratio, agreement in zip(found, ratios, middle, strict=True):
            axes.annotate(profile.name, (ratio, agreement), textcoords="offset points", xytext=(5, 6), fontsize=8)
    for floor in (0.99, 0.97):
        axes.axhline(floor, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("ratio: raw bytes / all bytes on the wire")
    axes.set_ylabel("token agreement under KV injection")
    axes.set_ylim(bottom=max(0.0, min([0.88, *(item.agreement for item in judged if item.agreement > 0.8)])))
    axes.set_title(title)
    axes.legend(loc="lower left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": ""})
