"""Maps of stored embeddings by t-SNE, as pictures or as a page that plays the clips; needs the extra ``plot``.

Figure 2 of the paper draws such maps of whole data sets (perplexity 50).
"""

from gura_jax.tsne.clips import DATA_SET, Clips, read_clips
from gura_jax.tsne.colors import Colors, color_by
from gura_jax.tsne.layout import PERPLEXITY, Map, make_map
from gura_jax.tsne.page import PAGE, write_page
from gura_jax.tsne.picture import PICTURES, draw

__all__ = [
    "DATA_SET",
    "PAGE",
    "PERPLEXITY",
    "PICTURES",
    "Clips",
    "Colors",
    "Map",
    "color_by",
    "draw",
    "make_map",
    "read_clips",
    "write_page",
]
