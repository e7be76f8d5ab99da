"""Stage `figures`: plots of a study's tables, each as PNG for the screen and PDF for print.

The colour map is perceptually uniform and readable with colour blindness and in grey; one module sets the style.
Each function draws a tidy table, and writes the PNG to ``out`` and the PDF next to it.
"""

from conceptshare.figures._averages import draw_averages
from conceptshare.figures._intervals import draw_intervals
from conceptshare.figures._layerwise import draw_layerwise
from conceptshare.figures._matrix import draw_matrix
from conceptshare.figures._paper import draw_paper
from conceptshare.figures._saes import draw_saes
from conceptshare.figures._samples import draw_samples
from conceptshare.figures._scatter import draw_scatter
from conceptshare.figures._sharedness import draw_sharedness
from conceptshare.figures._similarity import draw_similarity
from conceptshare.figures._strength import draw_strength
from conceptshare.figures._style import save

__all__ = [
    "draw_averages",
    "draw_intervals",
    "draw_layerwise",
    "draw_matrix",
    "draw_paper",
    "draw_saes",
    "draw_samples",
    "draw_scatter",
    "draw_sharedness",
    "draw_similarity",
    "draw_strength",
    "save",
]
