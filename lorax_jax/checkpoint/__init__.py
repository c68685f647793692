"""Adapters and merged models on disk, in the formats that others read."""

from .._names import NameMap as NameMap
from ._export import Export as Export
from ._export import check_export as check_export
from ._export import export_merged as export_merged
from ._files import layer_replication as layer_replication
from ._grown import read_growth as read_growth
from ._load import load_adapter as load_adapter
from ._receipt import Receipt as Receipt
from ._save import save_adapter as save_adapter
