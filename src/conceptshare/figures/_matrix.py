"""The wMPPC matrices."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from conceptshare.figures._style import READING_TITLES, STYLE, heatmap, save
from conceptshare.formats import short_labels


def draw_matrix(table: pd.DataFrame, out: Path) -> None:
    """The wMPPC matrix of each reading, annotated, with one colour scale and lines between groups."""
    members = list(dict.fromkeys(table["source"]))
    labels = short_labels(members)
    of_member = table.drop_duplicates("source").set_index("source")
    groups = [f"{of_member.source_modality[m]} {of_member.source_kind[m]}" for m in members]
    side = 1.5 + 0.55 * len(members)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3 * side + 0.8, side + 0.6), layout="constrained")
        axes = figure.subplots(1, len(READING_TITLES), sharey=True)
        for ax, (reading, title) in zip(axes, READING_TITLES.items(), strict=True):
            of_reading = table[table.reading == reading]
            cells = of_reading.pivot(index="source", columns="target", values="wmppc").loc[members, members]
            image = heatmap(ax, cells.to_numpy(), 0, max(table.wmppc.max(), 1e-6), annotate=True)
            ax.set_title(title)
            ax.set_xticks(range(len(members)), labels, rotation=45, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(len(members)), labels)
            for n in range(1, len(members)):
                if groups[n] != groups[n - 1]:
                    ax.axhline(n - 0.5, color="white", linewidth=2)
                    ax.axvline(n - 0.5, color="white", linewidth=2)
            ax.set_xlabel("to")
        axes[0].set_ylabel("from")
        figure.colorbar(image, ax=axes, label="wMPPC", shrink=0.85)
        save(figure, out)
