"""Files of Hugging Face's hub, and whether it can be asked at all.

They are kept where `huggingface_hub` keeps them (HF_HOME), and are taken from there without a
network.
"""

import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path

_SOON = 3.0  # seconds to connect


def hub_answers() -> bool:
    """Return whether Hugging Face's hub, or the mirror of HF_ENDPOINT, can be reached now."""
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = urllib.request.getproxies()
    if "https" in proxies or "all" in proxies:
        return True  # who answers is not known before it is asked
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), _SOON):
            return True
    except OSError:
        return False


def hub_file(repository: str, file: str) -> Path:
    """Return the path of a file of `owner/name` on this machine; it is fetched if necessary.

    Raises:
        ImportError: An extra is missing; the message names it.
        ValueError: The file is not there or cannot be had.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "Hugging Face's hub needs huggingface_hub: pip install '.[hub]' in a clone"
        ) from error
    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, file)
        if not hub_answers():  # which its own client finds out after half a minute
            if isinstance(cached, str):
                return Path(cached)
            raise ConnectionError("it does not answer.")
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # of many kinds, by httpx and by the hub
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} of {repository!r} cannot be had from Hugging Face's hub: {first} Without a "
            "network it has to lie in the hub's cache (HF_HOME)."
        ) from error
