"""The arguments of `onerec prepare`, and what can be said against them before the long work starts."""

import math
import os
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Literal

from ..data import EventShards, SessionConfig, compress_lifelong
from .checks import check_keywords
from .model_arguments import mapping, model_path

LOAD_OPTIONS = {"drop_nulls", "drop_duplicates", "drop_unknown", "items_columns", "users_columns", "split"}


@dataclass
class PrepareArguments:
    source: str = field(
        metadata={"help": "parquet, CSV or JSONL file, folder of datasets or of a public layout, or Hub data set."}
    )
    output: str = field(metadata={"help": "Folder to write."})
    layout: Literal["logs", "amazon", "kuairand"] = field(
        default="logs", metadata={"help": "logs: a table of events; amazon, kuairand: the public files."}
    )
    shown_before: bool = field(
        default=False, metadata={"help": "kuairand: put what users were shown before the log into their histories."}
    )
    columns: str = field(default="{}", metadata={"help": "Our names to yours, for user_id, item_id, timestamp."})
    feedback: list[str] = field(
        default_factory=list, metadata={"help": "Event columns to keep (play_time_ms, is_like)."}
    )
    items: str | None = field(default=None, metadata={"help": "Item table (text, category, ...), same file kinds."})
    users: str | None = field(default=None, metadata={"help": "User table, same file kinds."})
    load_options: str = field(
        default="{}", metadata={"help": f"More arguments of load_interactions: {', '.join(sorted(LOAD_OPTIONS))}."}
    )
    num_shards: int | None = field(
        default=None, metadata={"help": "Files per split; default one per 2 million events of the log."}
    )
    k_core: int = field(
        default=0, metadata={"help": "Leave out users and items of fewer events, until there are none; 0 keeps all."}
    )
    watched: str = field(
        default="{}", metadata={"help": 'What makes histories and targets, columns and thresholds: {"long_view": 1}.'}
    )
    validation_start: float | None = field(
        default=None, metadata={"help": "Split by time from here on; otherwise leave last out."}
    )
    test_start: float | None = field(
        default=None, metadata={"help": "End of the validation and start of the test, with validation_start."}
    )
    sessions: str | None = field(
        default=None,
        metadata={"help": "Rows of high-quality sessions: arguments of SessionConfig, YAML mapping or JSON."},
    )
    lifelong: str | None = field(
        default=None,
        metadata={"help": "onerec_v1: compress long histories; arguments of compress_lifelong, YAML mapping or JSON."},
    )
    embeddings: str | None = field(default=None, metadata={"help": ".npy or .safetensors with one row per item."})
    text_model: str | None = field(default=None, metadata={"help": "Encoder: Hub name, folder, package:NAME/FOLDER."})
    text_fields: list[str] = field(default_factory=list, metadata={"help": "Columns of the items for text_model."})
    optional_text_fields: list[str] = field(
        default_factory=list, metadata={"help": "More of them: those that the items have are read, if any."}
    )
    text_shard: str | None = field(
        default=None,
        metadata={
            "help": "i/n, i from 0: only embed the texts of every n-th file, and stop. n such runs share the work; "
            "one without it does the rest."
        },
    )
    collaborative_dim: int = field(default=128, metadata={"help": "Width of the co-occurrence embedding; 0 for none."})
    quantizer: Literal["residual_kmeans", "rqvae"] = field(
        default="residual_kmeans", metadata={"help": "What makes the codes."}
    )
    align: bool = field(default=False, metadata={"help": "Adapt text embeddings to Swing and co-click pairs."})
    caption_model: str | None = field(
        default=None,
        metadata={"help": "Causal model that must tell text_fields from what align makes; new: a small one."},
    )
    semantic_ids_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub repository of a model: its items keep their semantic IDs, new ones get codes of "
            "its codebooks. For onerec sft --continue_from."
        },
    )
    num_levels: int = field(default=3, metadata={"help": "Codes of a semantic ID."})
    codebook_size: int | None = field(
        default=256, metadata={"help": "null in a YAML file: the power of two nearest to an eighth of the items."}
    )
    balanced: str = field(
        default="true",
        metadata={
            "help": "residual_kmeans: true, equal sizes; greedy, OneRec's Algorithm 1 as printed; false, plain."
        },
    )
    collisions: Literal["extra_level", "next_free", "keep"] = field(
        default="next_free",
        metadata={"help": "Items of equal codes: a number more, the nearest free code, or shared codes."},
    )
    seed: int = field(default=0, metadata={"help": "Of all that is drawn at random."})


def balance(args: PrepareArguments) -> bool | Literal["greedy"]:
    """What `balanced` says, a word on the command line and a boolean in a YAML file, as `ResidualKMeans` takes it."""
    known: dict[str, bool | Literal["greedy"]] = {"true": True, "false": False, "greedy": "greedy"}
    if (word := str(args.balanced).lower()) not in known:
        raise ValueError(f"balanced={args.balanced!r}: allowed are {', '.join(known)}.")
    return known[word]


def text_shard(args: PrepareArguments) -> tuple[int, int]:
    """What `text_shard` says: which of how many, counted from 0."""
    first, _, count = str(args.text_shard).partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise ValueError(f"text_shard={args.text_shard!r}: write 0/4, 1/4, 2/4 or 3/4 for four processes.")
    return int(first), int(count)


def session_config(args: PrepareArguments) -> SessionConfig | None:
    """What `sessions` describes; the watched events are those of `watched`, unless it names its own."""
    if args.sessions is None:
        return None
    watched = mapping(args.watched)
    settings = ({"watched": watched} if watched else {}) | mapping(args.sessions)
    names = [field.name for field in fields(SessionConfig)]
    if unknown := [name for name in settings if name not in names]:
        raise ValueError(f"sessions has {unknown}, which SessionConfig does not know; it has {names}.")
    return SessionConfig(**settings)


def lifelong_settings(args: PrepareArguments) -> dict | None:
    """What `lifelong` describes, with the seed; None where histories stay as they are."""
    if args.lifelong is None:
        return None
    settings = mapping(args.lifelong)
    check_keywords("lifelong", settings, compress_lifelong)
    config = session_config(args)
    if config is None or config.history != "all":
        raise ValueError(
            "lifelong compresses what was shown before a row's targets: give sessions, with history: all. One row per "
            "watched item "
            'is {"max_gap": 0, "max_events": 1, "history": "all", ...}, as in mydata/lifelong_prepare.yaml.'
        )
    return {"seed": args.seed} | settings


def check_lifelong(settings: dict, columns: list[str]) -> None:
    """Before embeddings are made: event columns of the lifelong pathway that the rows do not have."""
    defaults = {name: parameter.default for name, parameter in signature(compress_lifelong).parameters.items()}
    wanted = [*settings.get("sparse", defaults["sparse"]), *settings.get("averaged", defaults["averaged"])]
    if absent := [name for name in wanted if name not in columns]:
        raise ValueError(
            f"lifelong takes the event columns {wanted}; {absent} are not among those of the rows, {columns}. Name "
            "them in feedback, or others in sparse and averaged."
        )


def check_arguments(args: PrepareArguments) -> None:
    """Before anything is read: arguments that contradict each other, files that are not there, an output that is not
    writable.
    """
    if args.layout != "logs":
        of_logs = ("columns", "feedback", "items", "users", "load_options")
        if given := [name for name in of_logs if getattr(args, name) not in ("{}", {}, [], None)]:
            raise ValueError(f"layout={args.layout!r} has its own columns and tables: leave out {given}.")
    if args.shown_before and args.layout != "kuairand":
        raise ValueError(f"shown_before is for the layout kuairand, this one is {args.layout}: leave it out.")
    if unknown := sorted(set(mapping(args.load_options)) - LOAD_OPTIONS):
        raise ValueError(f"load_options has {unknown}; allowed are {sorted(LOAD_OPTIONS)}.")
    start, test = args.validation_start, args.test_start
    if (start is None) != (test is None) or (start is not None and not start < test):
        raise ValueError(
            f"validation_start={start} and test_start={test}: give both, the earlier one first, or none (leave last "
            "out)."
        )
    balance(args)
    _check_frozen_codebooks(args)
    session_config(args)
    lifelong_settings(args)
    _check_embedding_arguments(args)
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={args.output!r} is a file: name a folder.")
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise PermissionError(f"output={args.output!r} cannot be written: name another folder.")


def _check_frozen_codebooks(args: PrepareArguments) -> None:
    if args.semantic_ids_from is None:
        return
    defaults = {field.name: field.default for field in fields(PrepareArguments)}
    own = ("quantizer", "num_levels", "codebook_size", "balanced")
    if given := [name for name in own if getattr(args, name) != defaults[name]]:
        raise ValueError(f"semantic_ids_from={args.semantic_ids_from!r} brings its codebooks: leave out {given}.")
    if args.collaborative_dim or args.align:
        raise ValueError(
            "semantic_ids_from needs embeddings that are the same on every day: those of the co-occurrences "
            f"(collaborative_dim={args.collaborative_dim}) and of align={args.align} are made anew from every log. "
            "Set --collaborative_dim 0, and give --embeddings or --text_model, now and where the codebooks are fitted."
        )


def _check_embedding_arguments(args: PrepareArguments) -> None:
    for name in (args.text_model, args.caption_model):
        if name and name != "new":
            model_path(name)  # raises for a package that is not installed
    if args.caption_model and not args.align:
        raise ValueError(f"caption_model {args.caption_model!r} is part of the alignment: set align, too.")
    if (args.text_model or args.caption_model) and not (args.text_fields or args.optional_text_fields):
        raise ValueError("text_model and caption_model read texts: name columns of the items in text_fields.")
    if args.text_fields and not (args.text_model or args.caption_model):
        raise ValueError(
            f"text_fields={args.text_fields} would do nothing: no model reads them. Give --text_model "
            "sentence-transformers/all-MiniLM-L6-v2, or another encoder, or leave them out."
        )
    if args.text_shard is not None:
        text_shard(args)
        if not args.text_model:
            raise ValueError(f"text_shard={args.text_shard!r} is for text_model: give one, or leave it out.")
    if args.align and not (args.embeddings or args.text_model):
        raise ValueError("align adapts embeddings: give embeddings, or text_model with text_fields.")
    if not (args.embeddings or args.text_model or args.collaborative_dim):
        raise ValueError("no embedding: give --embeddings, --text_model with --text_fields, or --collaborative_dim.")
    if args.embeddings and not Path(args.embeddings).is_file():
        raise FileNotFoundError(f"embeddings={args.embeddings!r} is not there: name a .npy or .safetensors file.")
    for name, least in (("num_levels", 1), ("codebook_size", 2), ("collaborative_dim", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"{name}={getattr(args, name)}: at least {least}.")


def settle(args: PrepareArguments, log: EventShards) -> tuple[PrepareArguments, int]:
    """The arguments with what they leave to the log, which texts there are, and the size of a codebook."""
    room = math.ceil(math.log2(max(log.num_items, 2)) / args.num_levels)  # or the items would not all get one
    size = args.codebook_size or 2 ** max(room, round(math.log2(max(log.num_items / 8, 1))))
    optional = [name for name in args.optional_text_fields if name in log.items and name not in args.text_fields]
    texts, model, captions = [*args.text_fields, *optional], args.text_model, args.caption_model
    if args.optional_text_fields:
        print(f"texts: {', '.join(texts) or 'none'} of the items' columns {', '.join(log.items) or '(none)'}")
    if not texts:
        model = captions = None
    if args.codebook_size is None and args.semantic_ids_from is None:
        print(f"codebooks of {size} codes for {log.num_items:,} items")
    settled = replace(args, text_fields=texts, text_model=model, caption_model=captions)
    check_items(settled, size, log)
    return settled, size


def check_items(args: PrepareArguments, size: int, log: EventShards) -> None:
    """Before embeddings and semantic IDs are made: text fields that are not there, levels without room for the
    items.
    """
    count = log.num_items
    if not (args.embeddings or args.text_model or args.collaborative_dim):
        raise ValueError(
            f"no embedding: the items have none of optional_text_fields={args.optional_text_fields}, only "
            f"{list(log.items)}. Give collaborative_dim, or the names of your texts."
        )
    if absent := [name for name in args.text_fields if name not in log.items]:
        raise ValueError(f"text_fields={absent}: the items have only {list(log.items)}.")
    fits = {"collaborative_dim": count} if args.collaborative_dim > count else {}
    if size > count and args.semantic_ids_from is None:
        fits["codebook_size"] = max(count // 8, math.ceil(count ** (1 / args.num_levels)))
    if fits:
        given = {"collaborative_dim": args.collaborative_dim, "codebook_size": size}
        raise ValueError(
            f"{count} items are too few for {' and '.join(f'{name}={given[name]}' for name in fits)}. "
            f"Give {' '.join(f'--{name} {value}' for name, value in fits.items())}."
        )
    if args.semantic_ids_from is not None:
        return
    if args.collisions == "next_free" and size**args.num_levels < count:
        raise ValueError(
            f"num_levels={args.num_levels} of codebook_size={size} make {size**args.num_levels} semantic IDs for "
            f"{count} items: raise one of them, or set collisions to extra_level or keep."
        )
