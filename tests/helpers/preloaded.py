"""What test processes and the forks that tests start share: slow imports, and Snakemake's search for its plugins."""
# ruff: noqa: F401

import datasets
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_pdf
import open_clip
import pyarrow.parquet
import smart_open
import timm
import torch._dynamo  # optimisers import it when they are created
import transformers.models.bert.modeling_bert
import transformers.models.siglip.modeling_siglip
import transformers.models.vit.image_processing_vit
import transformers.models.vit.modeling_vit
from snakemake.cli import get_argument_parser

import conceptshare.analysis.formats
import conceptshare.analysis.similarity
import conceptshare.analysis.tables
import conceptshare.cli
import conceptshare.concepts.examples
import conceptshare.concepts.names
import conceptshare.correlations._store
import conceptshare.encoders._transformers
import conceptshare.encoders.weights
import conceptshare.figures
import conceptshare.pages
import conceptshare.sae._stream
import conceptshare.sae.features

get_argument_parser()
