"""The command `s2o`: arguments in, one clear line for every error, exit codes that mean something."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from s2o_cupy import commands, quality_commands
from s2o_cupy._version import __version__
from s2o_cupy.calibration import METRICS
from s2o_cupy.quality import TAUS
from s2o_cupy.samples import NAMES
from s2o_cupy.settings import Settings

COMMANDS = commands.COMMANDS | quality_commands.COMMANDS
DESCRIPTION = """\
Sparse attention over NumPy and CuPy arrays: S2O (arXiv 2602.22575) with a better ranking and a tail.

  s2o demo                     real attention heads, dense against sparse, with a picture
  s2o run FILE.npz --dense     your own q, k, v, checked against exact attention
  s2o calibrate FILE.npz --error 0.01   settings that meet an error you accept
  s2o sweep FILE.npz           density against error of every head
  s2o audit FILE.npz           the error on sampled rows, at any length
  s2o info                     what is installed, which backends work, and what is missing for the others
"""
EXIT_CODES = """\
exit codes: 0 done; 1 it could not be done (a file, memory, a missing package); 2 the input or an option is wrong;
130 interrupted"""
_SETTINGS_HELP = {
    "causal": "query i sees keys up to i + Nk - Nq (default); --no-causal: every key",
    "window": "keys, its own the last, that a causal query sees; within a window attention is dense",
    "scale": "factor on q.k, above 0 (default 1/sqrt(D))",
    "segment": "queries that share one ranking of the keys",
    "block_q": "queries of a row tile: what stops together",
    "block_k": "ranked keys of a key tile: a stop falls after one",
    "pool": "keys of a pool block of the tail, a power of two",
    "rank": "gaussian, mixture (the best order, at more work) or mean (the paper's)",
    "rank_terms": "rank of the covariance factor, or centres of the mixture; none: all",
    "rank_levels": "steps that scores are quantised to before ordering, or none",
    "tail": "pooled, spread, or none (the paper's)",
    "tau": "stop after a key tile that adds less than this share to every row; 0 never stops; T,T,...: one a head",
    "query_order": "position, or guide (the paper's)",
    "share_order": "one ranking for all the query heads of a K/V head",
    "cap": "share of a history, in (0, 1], that can be walked",
}


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line, as all others are."""

    def error(self, message: str):
        self.exit(2, f"s2o: error: {message} ({self.prog} --help shows what is)\n")


def main(argv: list[str] | None = None) -> int:
    """Run `s2o` with these arguments (default: the process's); returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        if "paper" in options:
            options.settings = _settings(options)
        COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("s2o: interrupted", file=sys.stderr)
        return 130
    except (TypeError, ValueError) as error:
        return _refuse(error, 2)
    except (OSError, ImportError, MemoryError, RuntimeError) as error:
        return _refuse(error, 1)
    except Exception as error:
        if os.environ.get("S2O_TRACEBACK"):
            raise
        return _refuse(RuntimeError(f"a fault of s2o's own, {error!r}; S2O_TRACEBACK=1 shows where"), 1)
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    """The settings that a command line asks for: a file's, or the defaults, then each flag given."""
    base = Settings() if options.settings is None else Settings.load(options.settings)
    if options.paper or options.precise:
        base = Settings.paper() if options.paper else Settings.precise()
    names = (f.name for f in dataclasses.fields(Settings))
    return base.replace(**{n: getattr(options, n) for n in names if hasattr(options, n)})


def _refuse(error: Exception, code: int) -> int:
    text = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
    if isinstance(error, OSError) and error.strerror and not text.startswith("'"):
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    print(f"s2o: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("s2o", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"s2o_cupy {__version__}")
    commands_ = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands_.add_parser(
        "demo",
        help="real attention heads computed sparsely: table and picture",
        description="Runs the shipped heads of a language model dense and sparse, prints what it cost and what it "
        "saved, and draws one head before and after ranking with the place where each row tile stopped.",
        epilog="example: s2o demo --tau 0.003 --png demo.png",
    )
    demo.add_argument("--sample", choices=NAMES, action="append", help="only this sample (may be repeated)")
    demo.add_argument("--png", default="s2o_demo.png", metavar="FILE", help="picture to write (default %(default)s)")
    _common(demo)

    run = commands_.add_parser(
        "run",
        help="attention over your own q, k, v",
        description="Sparse attention over q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv); leading axes may "
        "be missing. Files are memory-mapped where they can be.",
        epilog="example: s2o run heads.npz --tau 0.003 --dense --out answer.npz",
    )
    run.add_argument("files", nargs="+", metavar="FILE", help="one npz with q, k and v, or three npy files: q k v")
    run.add_argument("--out", metavar="OUT.npz", help="write out and lse here, whole or not at all")
    run.add_argument("--dense", action="store_true", help="compute exact attention too: error and speed-up")
    run.add_argument("--check-finite", action="store_true", help="refuse NaN and infinity, naming the place")
    _common(run)

    compiling = commands_.add_parser(
        "compile",
        help="compile the CUDA kernels without a GPU",
        description="Compiles every shipped kernel with NVRTC (pip install 's2o-cupy[compile]'), without a GPU or a "
        "driver, and prints registers, spills and shared memory. Unchanged ones come from a cache ($S2O_CACHE_DIR).",
        epilog="example: s2o compile --arch sm_90a --check",
    )
    compiling.add_argument("--arch", default="sm_80,sm_90a,sm_100", metavar="A,A", help="default %(default)s")
    compiling.add_argument("--check", action="store_true", help="fail on spills in a kernel that promises none")
    compiling.add_argument("--json", action="store_true", help="print JSON in place of the table")
    _quality(commands_)
    info = commands_.add_parser("info", help="versions, devices, backends", description=commands.info.__doc__)
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _quality(commands_) -> None:
    """The commands of quality_commands.py."""
    files = {"nargs": "+", "metavar": "FILE", "help": "one npz with q, k and v, or three npy files: q k v"}
    sweep = commands_.add_parser(
        "sweep",
        help="density against error of every head",
        description="Attends with a range of tau under one ranking and compares sampled rows with exact attention.",
        epilog="example: s2o sweep heads.npz --png sweep.png --rank mean",
    )
    sweep.add_argument("files", **files)
    sweep.add_argument("--taus", type=_taus, default=TAUS, metavar="T,T,...", help="what to try")
    sweep.add_argument("--png", metavar="FILE", help="picture to write")
    calibrate = commands_.add_parser(
        "calibrate",
        help="settings that meet an error you accept",
        description="Searches tau, and segment and rank where they pay, for the least work whose error on sampled "
        "rows is at most the one given.",
        epilog="example: s2o calibrate heads.npz --error 0.01 --out settings.json; "
        "s2o run heads.npz --settings settings.json",
    )
    calibrate.add_argument("files", **files)
    calibrate.add_argument("--error", type=float, default=0.01, help="greatest error accepted (default %(default)s)")
    calibrate.add_argument("--metric", choices=METRICS, default=METRICS[0], help="what error means")
    calibrate.add_argument("--per-head", action="store_true", help="a tau for each head")
    calibrate.add_argument("--out", metavar="SETTINGS.json", help="write the settings here")
    audit = commands_.add_parser(
        "audit",
        help="attention checked on sampled rows",
        description="Sparse attention, then exact attention of some query rows: error with its confidence interval, "
        "captured mass, cosine. Memory stays bounded at any length.",
        epilog="example: s2o audit heads.npz --rows 512 --tau 0.003",
    )
    audit.add_argument("files", **files)
    for parser, rows in ((sweep, 1024), (calibrate, 8192), (audit, 256)):
        parser.add_argument("--rows", type=int, default=rows, help="query rows to compare (default %(default)s)")
        parser.add_argument("--seed", type=int, default=0, help="of the sample of rows")
        _common(parser)


def _taus(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: numbers with commas between them") from None


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--backend",
        choices=commands.BACKENDS,
        help="default: cpu; for demo, cuda where it works",
    )
    group = parser.add_argument_group("settings (docs/design.md section 2)")
    presets = group.add_mutually_exclusive_group()
    presets.add_argument("--settings", metavar="FILE.json", help="start from settings that Settings.save wrote")
    presets.add_argument("--paper", action="store_true", help="start from S2O as published")
    presets.add_argument("--precise", action="store_true", help="start from the best order known, at more ranking work")
    for field in dataclasses.fields(Settings):
        flag, text = "--" + field.name.replace("_", "-"), _SETTINGS_HELP[field.name]
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            shown = "1/sqrt(D)" if field.name == "scale" else field.default
            group.add_argument(
                flag, type=_value, default=argparse.SUPPRESS, metavar="X", help=f"{text} [{shown}]".replace("%", "%%")
            )


def _value(text: str):
    """A flag's value: none, a whole number, a number, a word, or some with commas between; `Settings` judges it."""
    if "," in text:
        return tuple(_value(part) for part in text.split(","))
    if text.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
