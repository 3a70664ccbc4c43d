"""
Fetches Tiny Shakespeare into data/input.txt: from public mirrors, or from a copy of yours.

    python download_data.py                          # tries each mirror in turn
    python download_data.py --source copy.txt        # imports a file
    python download_data.py --source https://...     # or any address that serves the same bytes

Whatever the source, the bytes are checked against the corpus's known SHA-256 before anything is
put in place: a truncated, altered or HTML answer leaves data/input.txt as it was. The bytes go to
a temporary file in the same folder first, which is then renamed: there is never half a corpus.
"""

import argparse
import contextlib
import hashlib
import os
import queue
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests

# The 40,000 lines that Andrej Karpathy collected for char-rnn (2015), and copies of that file.
MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    "https://cdn.statically.io/gh/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
)
SIZE = 1_115_394  # bytes
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DESTINATION = Path(__file__).resolve().parent / "data" / "input.txt"


class DownloadError(OSError):
    """The corpus could not be had; the message says from where and why, source by source."""


class Refused(Exception):
    """This answer will not get better by asking again: not found, or not the corpus."""


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def check(data: bytes) -> bytes:
    """The bytes themselves if they are the corpus; raises Refused, saying what they are instead."""
    if hashlib.sha256(data).hexdigest() == SHA256:
        return data
    if data.lstrip()[:1] == b"<":
        raise Refused("a web page, not the corpus")
    if len(data) > SIZE:
        raise Refused(f"another file: more than {SIZE:,} bytes")
    if len(data) < SIZE:
        raise Refused(f"truncated or another file: {len(data):,} of {SIZE:,} bytes")
    raise Refused(f"altered: {SIZE:,} bytes whose SHA-256 is not the corpus's")


def fetch(url: str, timeouts: tuple[float, float]) -> bytes:
    """One attempt at one address, with a progress line. Returns the checked bytes.

    timeouts, in seconds: for the connection to stand, and for the next bytes to arrive."""
    with requests.get(url, stream=True, timeout=timeouts) as response:
        if response.status_code in (408, 429) or response.status_code >= 500:
            response.raise_for_status()  # may pass: worth another attempt
        if response.status_code != 200:
            raise Refused(f"HTTP status {response.status_code}")
        data, on_terminal = bytearray(), sys.stderr.isatty()
        for chunk in response.iter_content(chunk_size=64 * 1024):
            data += chunk
            if on_terminal:
                say(f"\r  {len(data) / SIZE:4.0%} of {SIZE:,} bytes", end="")
            if len(data) > SIZE:
                break
        if on_terminal:
            say("")
    return check(bytes(data))


def within(seconds: float, function, *args):
    """function(*args), given up with requests.Timeout after so many seconds.

    The time-outs of requests bound neither a slow name server nor a server that sends one byte now
    and then. So the work is done in a thread, which is abandoned when the time is over."""
    outcome = queue.SimpleQueue()

    def work():
        try:
            outcome.put((function(*args), None))
        except Exception as problem:
            outcome.put((None, problem))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, problem = outcome.get(timeout=seconds)
    except queue.Empty:
        raise requests.Timeout(f"not finished after {seconds:g} s") from None
    if problem is not None:
        raise problem
    return result


def put_in_place(data: bytes, destination: Path) -> None:
    """Writes data beside its destination and renames it there: all of it or nothing."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=destination.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(partial, destination)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def reason(problem: Exception) -> str:
    """One short line for an exception of requests', whose own texts run to several."""
    if isinstance(problem, requests.Timeout):
        return "no answer in time"
    if isinstance(problem, requests.HTTPError):
        return f"HTTP status {problem.response.status_code}"
    if isinstance(problem, requests.exceptions.ChunkedEncodingError):
        return "the answer broke off"
    if isinstance(problem, requests.ConnectionError):
        return "no connection"
    return str(problem).splitlines()[0] if str(problem) else type(problem).__name__


def download(destination: Path = DESTINATION, urls=None, seconds: float = 120.0, pause: float = 0.5,
             timeouts: tuple[float, float] = (5.0, 15.0)) -> None:
    """Puts the corpus at destination from the first address (of urls, or MIRRORS) to deliver it.

    It takes `seconds` at most: an address may use an equal share of what is left of them. What may
    pass, such as a server's error, is tried once more, after a pause; a time-out is not. Raises
    DownloadError if no address delivers, and OSError if the file cannot be written."""
    urls, end, failures = list(urls or MIRRORS), time.monotonic() + seconds, []
    for i, url in enumerate(urls):
        share_ends = time.monotonic() + (end - time.monotonic()) / (len(urls) - i)
        for last in (False, True):
            say(f"downloading {url}" + " (again)" * last)
            try:
                left = max(share_ends - time.monotonic(), 0.0)
                data = within(left, fetch, url, timeouts)
            except (Refused, requests.RequestException, ValueError) as problem:  # or no address
                failure = reason(problem)
                if last or isinstance(problem, (Refused, requests.Timeout)):
                    break
                time.sleep(min(pause, left))
            else:
                put_in_place(data, Path(destination))
                return say(f"wrote {destination}: {len(data):,} bytes, checksum right")
        say(f"  failed: {failure}")
        failures.append(f"{url.split('/')[2]}: {failure}")
    raise DownloadError("no source delivered the corpus (" + "; ".join(failures) + ")")


def import_copy(source: str, destination: Path = DESTINATION) -> None:
    """Puts the corpus at destination from a file or an address. Raises DownloadError."""
    if source.lower().startswith(("http://", "https://")):
        return download(destination, urls=(source,))
    try:
        with open(source, "rb") as file:
            data = check(file.read(SIZE + 1))  # no more, since some files have no end
    except Refused as refusal:
        raise DownloadError(f"{source}: {refusal}") from None
    except OSError as problem:
        raise DownloadError(f"{source}: {problem.strerror}") from None
    put_in_place(data, Path(destination))
    say(f"wrote {destination}: {len(data):,} bytes, checksum right")


def find(destination: Path = DESTINATION) -> Path:
    """Where the corpus is: at destination, downloaded at need; else, loudly, the sample instead."""
    sample = destination.with_name("sample.txt")
    try:
        if not destination.exists():
            download(destination)
        return destination
    except OSError as problem:
        say(f"{'!' * 80}\nTiny Shakespeare is not here: {problem}\nTraining on the small sample "
            f"{sample} instead: expect far poorer text.\nFor the real corpus, connect and try "
            "again, or import a copy with\n`python download_data.py --source FILE`; or train on a "
            "text of yours with --data.\n" + "!" * 80)
        return sample


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if the corpus could not be had."""
    parser = argparse.ArgumentParser(description="Fetch Tiny Shakespeare into data/input.txt.")
    parser.add_argument("--source", metavar="PATH_OR_URL", help="import this copy instead")
    args = parser.parse_args(argv)
    try:
        if args.source is not None:
            import_copy(args.source)
        else:
            download()
        return 0
    except KeyboardInterrupt:
        say("")
        return 130
    except OSError as problem:
        say(f"error: {problem}; {DESTINATION} is as it was; connect and try again, or import a "
            "copy with --source FILE")
        return 2


if __name__ == "__main__":
    sys.exit(main())
