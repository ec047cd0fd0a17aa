"""Logs -> interactions -> splits of events or sessions."""

from .data_folder import DataFolder
from .event_shards import EventShards
from .features import EventFeature, category_codes, category_map, check_event_features, reaches
from .interactions import Interactions, load_interactions
from .labels import event_labels, session_labels
from .lifelong import compress_lifelong, hierarchical_kmeans
from .log_shards import load_shards
from .past_rates import PastRates, past_rates, period_of, quantile_codes, rate_numbers
from .public_datasets import load_amazon, load_kuairand
from .session_splits import SessionSplit, session_splits, training_events
from .sessions import SessionConfig, session_criteria, session_index
from .split_files import SplitWriter, load_splits, read_part, with_users, write_part
from .splits import (
    GlobalTimeSplit,
    LeaveLastOut,
    Splitter,
    arrow_dataset,
    global_time_split,
    k_core,
    leave_last_out,
    target_rows,
)
from .streams import change_rows, count_lengths, first_rows, longest_list, mapped_split, stream_split
from .tables import match_ids, read_table
from .time_units import time_unit

__all__ = [
    "DataFolder",
    "EventFeature",
    "EventShards",
    "GlobalTimeSplit",
    "Interactions",
    "LeaveLastOut",
    "PastRates",
    "SessionConfig",
    "SessionSplit",
    "SplitWriter",
    "Splitter",
    "arrow_dataset",
    "category_codes",
    "category_map",
    "change_rows",
    "check_event_features",
    "compress_lifelong",
    "count_lengths",
    "event_labels",
    "first_rows",
    "global_time_split",
    "hierarchical_kmeans",
    "k_core",
    "leave_last_out",
    "load_amazon",
    "load_interactions",
    "load_kuairand",
    "load_shards",
    "load_splits",
    "longest_list",
    "mapped_split",
    "match_ids",
    "past_rates",
    "period_of",
    "quantile_codes",
    "rate_numbers",
    "reaches",
    "read_part",
    "read_table",
    "session_criteria",
    "session_index",
    "session_labels",
    "session_splits",
    "stream_split",
    "target_rows",
    "time_unit",
    "training_events",
    "with_users",
    "write_part",
]
