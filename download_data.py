"""
Downloads Tiny Shakespeare into data/input.txt, from public mirrors or from a copy of yours.

    python download_data.py                          # tries each mirror in turn
    python download_data.py --source copy.txt        # imports a file
    python download_data.py --source https://...     # or any address that serves the same bytes

The bytes are compared with the known SHA-256 checksum of the corpus before anything is written. If
an answer is truncated, altered, or an HTML page, data/input.txt stays as it was. The bytes are
written to a temporary file in the same folder, which is then renamed, so that there is never half a
corpus.
"""

import argparse
import contextlib
import hashlib
import os
import sys
import tempfile
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
    """No source delivered the corpus. The message says why, source by source."""


class Refused(Exception):
    """An answer that asking again would not change: not found, or not the corpus."""


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def check(data: bytes) -> bytes:
    """Returns the bytes if they are the corpus. Raises Refused, saying what they are instead."""
    if hashlib.sha256(data).hexdigest() == SHA256:
        return data
    if data.lstrip()[:1] == b"<":
        raise Refused("a web page, not the corpus")
    if len(data) > SIZE:
        raise Refused(f"another file: more than {SIZE:,} bytes")
    if len(data) < SIZE:
        raise Refused(f"truncated or another file: {len(data):,} of {SIZE:,} bytes")
    raise Refused(f"altered: {SIZE:,} bytes whose SHA-256 is not the corpus's")


def fetch(url: str, timeouts: tuple[float, float], deadline: float) -> bytes:
    """One attempt at one address, with a progress line. Returns the checked bytes.

    timeouts, in seconds: to connect, and to wait for the next bytes. Raises requests.Timeout when
    time.monotonic() passes the deadline."""
    with requests.get(url, stream=True, timeout=timeouts) as response:
        if response.status_code in (408, 429) or response.status_code >= 500:
            response.raise_for_status()  # this may pass: worth another attempt
        if response.status_code != 200:
            raise Refused(f"HTTP status {response.status_code}")
        data = bytearray()
        on_terminal = sys.stderr.isatty()
        for chunk in response.iter_content(chunk_size=16 * 1024):
            data += chunk
            if on_terminal:
                say(f"\r  {len(data) / SIZE:4.0%} of {SIZE:,} bytes", end="")
            if len(data) > SIZE:
                break
            if time.monotonic() > deadline:
                raise requests.Timeout("the download was too slow")
        if on_terminal:
            say("")
    return check(bytes(data))


def put_in_place(data: bytes, destination: Path) -> None:
    """Writes data beside its destination and renames it: all of it or nothing."""
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
    """A short reason for an exception. The texts of requests have several lines."""
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
    """Downloads the corpus to destination from the first address that delivers it.

    urls: the addresses, by default MIRRORS. seconds: for all of them together; each may use an
    equal share of what is left. An error that may pass, such as a server's, is followed by a second
    attempt after a pause. Raises DownloadError if no address delivers, and OSError if the file
    cannot be written."""
    urls = list(urls or MIRRORS)
    end = time.monotonic() + seconds
    failures = []
    for number, url in enumerate(urls):
        deadline = time.monotonic() + (end - time.monotonic()) / (len(urls) - number)
        try:
            data = fetch_with_retry(url, timeouts, deadline, pause)
        except (Refused, requests.RequestException, ValueError) as problem:
            # requests raises ValueError for what is not an address.
            say(f"  failed: {reason(problem)}")
            failures.append(f"{url.split('/')[2]}: {reason(problem)}")
        else:
            put_in_place(data, Path(destination))
            say(f"wrote {destination}: {len(data):,} bytes, checksum correct")
            return
    raise DownloadError("no source delivered the corpus (" + "; ".join(failures) + ")")


def fetch_with_retry(url: str, timeouts: tuple[float, float], deadline: float,
                     pause: float) -> bytes:
    """Up to two attempts at one address."""
    say(f"downloading {url}")
    try:
        return fetch(url, timeouts, deadline)
    except requests.Timeout:
        raise  # it would only take as long again
    except requests.RequestException as problem:
        say(f"  failed: {reason(problem)}; trying once more")
        time.sleep(pause)
        return fetch(url, timeouts, deadline)


def import_copy(source: str, destination: Path = DESTINATION) -> None:
    """Copies the corpus to destination from a file or an address. Raises DownloadError."""
    if source.lower().startswith(("http://", "https://")):
        download(destination, urls=(source,))
        return
    try:
        with open(source, "rb") as file:
            data = check(file.read(SIZE + 1))  # not more: some files have no end
    except Refused as refusal:
        raise DownloadError(f"{source}: {refusal}") from None
    except OSError as problem:
        raise DownloadError(f"{source}: {problem.strerror}") from None
    put_in_place(data, Path(destination))
    say(f"wrote {destination}: {len(data):,} bytes, checksum correct")


def is_there(destination: Path) -> bool:
    """Whether a file is the corpus."""
    try:
        check(destination.read_bytes())
        return True
    except (OSError, Refused):
        return False


def find(destination: Path = DESTINATION) -> Path:
    """The path of the corpus, downloaded if needed; or, with a warning, that of the sample."""
    sample = destination.with_name("sample.txt")
    try:
        if not destination.exists():
            download(destination)
        return destination
    except DownloadError as problem:
        say(f"{'!' * 80}\nTiny Shakespeare could not be downloaded: {problem}\nTraining uses the "
            f"small sample {sample} instead. Its text will be much poorer.\nFor the real corpus, "
            "connect to the network, or import a copy with `python download_data.py\n--source "
            "FILE`, and train in another --out_dir. You can also train on your own\ntext with "
            "--data.\n" + "!" * 80)
    except OSError as problem:
        say(f"{'!' * 80}\n{destination} could not be written: {problem.strerror}\nTraining uses "
            f"the small sample {sample} instead. Its text will be much poorer.\nFor the real "
            "corpus, make this folder writable and try again. You can also put the corpus\n"
            "elsewhere and name it by --data.\n" + "!" * 80)
    return sample


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if the corpus could not be downloaded."""
    parser = argparse.ArgumentParser(description="Download Tiny Shakespeare into data/input.txt.")
    parser.add_argument("--source", metavar="PATH_OR_URL", help="import this copy instead")
    args = parser.parse_args(argv)
    try:
        if args.source is not None:
            import_copy(args.source, DESTINATION)
        elif is_there(DESTINATION):
            say(f"{DESTINATION} is there already, checksum correct")
        else:
            download(DESTINATION)
        return 0
    except KeyboardInterrupt:
        say("")
        return 130
    except DownloadError as problem:
        say(f"error: {problem}; {DESTINATION} was not changed; connect and try again, or import a "
            "copy with --source FILE")
    except OSError as problem:
        say(f"error: {DESTINATION}: could not be written ({problem.strerror}); make its folder "
            "writable")
    return 2


if __name__ == "__main__":
    sys.exit(main())
