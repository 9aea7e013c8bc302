"""The command `retort`. Exit codes: 0 done, 2 the input is wrong (one line says why), 1 anything else."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import retort
from retort.cli import descriptions
from retort.cli.references import add_references
from retort.cli.serving import add_serve
from retort.cli.training import add_train, given, train
from retort.errors import RetortError, UserError, did_you_mean, shortened, visible
from retort.files import named, reason


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal without a character shows its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _arguments(words)
        if "WORLD_SIZE" in os.environ and arguments.run is not train:
            from retort.ranks import refuse_several

            refuse_several(words[0])
        code = int(arguments.run(arguments) or 0)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except RetortError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return 1
    except OSError as error:  # of the operating system: a closed pipe, a full disk
        if not isinstance(error, BrokenPipeError):
            _complain(f"{error.filename or 'standard output'}: {reason(error)}")
        _let_go()
        return 1


def _complain(message: str) -> None:
    """Prints an error on one line, unless standard error is closed."""
    if "RANK" in os.environ:  # torchrun's: only then are processes brought together
        from retort.ranks import may_speak

        if not may_speak():
            return
    message = visible(shortened(message, 2000))
    with contextlib.suppress(OSError, ValueError):
        print(f"retort: {message}", file=sys.stderr, flush=True)


def _let_go() -> None:
    """Discards what standard output still holds; else the interpreter would complain of it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _arguments(words: list[str]) -> argparse.Namespace:
    """Parses options and key=value words in any order, which argparse alone does not allow."""
    arguments, rest = _parser().parse_known_args(words)
    for word in rest:
        if not word.startswith("-") and "words" not in arguments:
            more = "; `retort settings method.NAME` shows one method" if arguments.run is _methods else ""
            raise UserError(f"one argument too many: '{shortened(word, 100)}'{more}")
        if word.startswith("-"):
            raise UserError(f"unknown option {shortened(word, 100)}; {_instead(word.partition('=')[0], words)}")
    if rest:
        arguments.words = [*arguments.words, *rest]
    return arguments


def _instead(option: str, words: list[str]) -> str:
    """Suggests what to write instead of an unknown option: a setting, which is a word, or the nearest option."""
    from retort.config import keys
    from retort.config.synonyms import ours_for

    known = _options(_parser(), words)
    takes_words = bool({"train", "doctor", "score"} & set(words))
    ours = ours_for(option, list(keys())) if takes_words and f"--{option.lstrip('-')}" not in known else None
    return did_you_mean(option, known) if ours is None else f"{ours}; settings are words: key=value"


def _options(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Returns the long options of the command that the words name."""
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    chosen = next(commands[word] for word in words if word in commands)
    return [option for action in chosen._actions for option in action.option_strings if option.startswith("--")]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors end like all wrong input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see retort --help)")


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="retort", description=descriptions.RETORT)
    parser.add_argument("--version", action="version", version=f"retort {retort.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    add_train(commands)

    doctor = commands.add_parser(
        "doctor", help="check models and data before training", description=descriptions.DOCTOR
    )
    doctor.add_argument("words", nargs="*", metavar="CONFIG.toml|key=value", help=descriptions.WORDS)
    for name in ("method", "student", "teacher", "base", "judge", "data"):
        doctor.add_argument(f"--{name}", help="as for `retort train`")
    doctor.add_argument("--quick", action="store_true", help="only the checks that `retort train` also makes")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    score = commands.add_parser("score", help="store a teacher's scores for other runs", description=descriptions.SCORE)
    _add_score(score)
    _add_eval(commands.add_parser("eval", help="evaluate a model: avg@k and pass@k", description=descriptions.EVAL))

    report = commands.add_parser("report", help="write the report of a run, or of several runs side by side")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder of runs")
    report.add_argument("--out", help="file; default: report.html in the run's folder, or here for several runs")
    report.set_defaults(run=_report)

    trust = commands.add_parser("trust", help="measure where a teacher can be trusted", description=descriptions.TRUST)
    _add_trust(trust)

    methods = commands.add_parser("methods", help="list the methods and their settings")
    methods.add_argument("--json", action="store_true", help="print JSON")
    methods.add_argument("--markdown", action="store_true", help="print the page docs/methods.md")
    methods.set_defaults(run=_methods)

    envs = commands.add_parser("envs", help="list the environments that a student can act in")
    envs.add_argument("--json", action="store_true", help="print JSON")
    envs.set_defaults(run=_envs)

    settings = commands.add_parser("settings", help="list every setting: default, bounds and meaning")
    settings.add_argument("section", nargs="?", metavar="SECTION", help="rollout, eval, method.gkd, ... or one setting")
    settings.add_argument("--method", help="show the defaults of this method's paper, and the method's own settings")
    settings.add_argument("--json", action="store_true", help="print JSON")
    settings.add_argument("--markdown", action="store_true", help="print the page docs/settings.md")
    settings.set_defaults(run=_settings)

    add_serve(commands)
    add_references(commands)

    cite = commands.add_parser("cite", help="print the BibTeX of a method's paper")
    cite.add_argument("names", nargs="+", metavar="NAME", help="name of a method")
    cite.set_defaults(run=_cite)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from retort import api, config
    from retort.console.terminal import RichObserver, examination_table, quiet_libraries
    from retort.preflight.doctor import examine

    files, flags, pairs = given(arguments, "student", "teacher", "base", "data")
    quiet_libraries()
    settings = api.assemble(*[config.read_toml(named(file)) for file in files], flags, pairs)
    RichObserver(Console(stderr=True)).working("loading the models and checking them")
    found = examine(settings, quick=arguments.quick)
    print(json.dumps(found.plain(), indent=2)) if arguments.json else Console().print(examination_table(found.plain()))
    return 2 if found.verdict == "fatal" else 0


def _add_score(score: argparse.ArgumentParser) -> None:
    """Adds what `retort score` is called with."""
    score.add_argument("data", metavar="DATA", help="file, folder, glob or hub name (docs/data.md)")
    score.add_argument("words", nargs="*", metavar="CONFIG.toml|key=value", help=descriptions.WORDS)
    for name in ("method", "student", "teacher", "base"):
        score.add_argument(f"--{name}", help="as for `retort train`")
    score.add_argument("--cache", metavar="DIR", help="folder of the cache (cache.dir)")
    score.add_argument("--json", action="store_true", help="print JSON")
    score.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from retort import api, config
    from retort.cli.score import line, score
    from retort.console.terminal import RichObserver, quiet_libraries

    files, flags, pairs = given(arguments, "student", "teacher", "base", "data")
    quiet_libraries()
    settings = api.assemble(*[config.read_toml(named(file)) for file in files], flags, pairs)
    observer = RichObserver(Console(stderr=True))
    observer.working("reading the data and loading the models")
    with contextlib.closing(observer):
        found = score(settings, observer)
    print(json.dumps(found, indent=2) if arguments.json else line(found))
    return 0


def _add_trust(trust: argparse.ArgumentParser) -> None:
    """Adds what `retort trust` is called with."""
    trust.add_argument("run_folder", metavar="RUN", help="folder of a run, or one of its checkpoints")
    trust.add_argument("--view", default="teacher", help="view of the method; default: %(default)s")
    trust.add_argument("--problems", type=int, default=64, help="maximum number of prompts; default: %(default)s")
    trust.add_argument("--places", type=int, default=4, help="positions per completion; default: %(default)s")
    trust.add_argument("--candidates", type=int, default=2, help="tokens forced per position; default: %(default)s")
    trust.add_argument("--seed", type=int, help="default: the seed of the run")
    trust.set_defaults(run=_trust)


def _add_eval(judge: argparse.ArgumentParser) -> None:
    """Adds what `retort eval` is called with."""
    judge.add_argument("model", help="model folder, hub name, or a built-in model such as countdown:student")
    judge.add_argument("--data", help="data with answers, or tasks of an environment; default: the built-in task")
    judge.add_argument(
        "--env", metavar="NAME", help="environment to play in, see `retort envs`; or module:name, or an address"
    )
    judge.add_argument("--teacher", help="model to measure entropies and divergences against")
    judge.add_argument("--json", action="store_true", help="print JSON")
    judge.add_argument("words", nargs="*", metavar="key=value", help="settings of the section eval, such as samples=16")
    judge.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from retort.cli.evaluation import evaluate, tasks
    from retort.console.terminal import RichObserver, quiet_libraries

    data, words = tasks(arguments.data, arguments.env, arguments.words)
    quiet_libraries()
    observer = RichObserver(Console(stderr=arguments.json))
    observer.working("reading the data and loading the model")
    with contextlib.closing(observer):
        results = evaluate(arguments.model, data, arguments.teacher, words, observer)
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        observer.table(results)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from retort.report.page import build_report

    runs = [named(run) for run in arguments.runs]

    def note(text: str) -> None:
        print(visible(f"note: {text}"), file=sys.stderr)

    print(visible(str(build_report(runs, None if arguments.out is None else named(arguments.out), note))))
    return 0


def _trust(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from retort import api
    from retort.cli.trust import measure
    from retort.console.terminal import RichObserver, quiet_libraries, trust_table

    quiet_libraries()
    observer = RichObserver(Console())
    observer.working("reading the run and loading its models")
    try:
        found = measure(
            named(arguments.run_folder),
            observer,
            view=arguments.view,
            problems=arguments.problems,
            places=arguments.places,
            candidates=arguments.candidates,
            seed=arguments.seed,
        )
    finally:
        observer.close()
    Console().print(trust_table(found))
    folder = Path(arguments.run_folder).resolve()
    print(visible(f"report: {api.write_report(folder.parents[1] if folder.parent.name == 'checkpoints' else folder)}"))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from retort.cli.catalogue import listed, page

    if arguments.markdown:
        if arguments.json:
            raise UserError("--markdown writes the whole page; give it alone, or leave it out")
        print(page(), end="")
        return 0
    print(listed(as_json=arguments.json))
    return 0


def _envs(arguments: argparse.Namespace) -> int:
    from retort.cli.environments import listed

    print(listed(as_json=arguments.json))
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    from retort.cli import reference

    if arguments.markdown:
        if arguments.section or arguments.method or arguments.json:
            raise UserError("--markdown writes the whole page; give it alone, or leave it out")
        print(reference.page(), end="")
        return 0
    found = reference.chosen(arguments.section, arguments.method)
    print(json.dumps(reference.plain(found), indent=2) if arguments.json else reference.text(found, arguments.method))
    return 0


def _cite(arguments: argparse.Namespace) -> int:
    from retort import registry

    papers = {name: registry.load(name).paper for name in arguments.names}
    unknown = [name for name, paper in papers.items() if paper is None]
    if unknown:
        raise UserError(f"method '{unknown[0]}' names no paper")
    print("\n\n".join(paper.bibtex(name) for name, paper in papers.items() if paper is not None))
    return 0
