"""One installation in a process of its own: to be raced and killed."""

import shutil
import subprocess
import sys
from pathlib import Path

SPACES = Path(__file__).parents[2] / "spaces"
PROGRAM = """
import sys
spaces, root, url, sha256, locks, patience = sys.argv[1:]
sys.path.insert(0, spaces)
from pathlib import Path
from llama_loader import store as module
from llama_loader.errors import LoaderError
from llama_loader.fetch import Fetcher

def no_lock(handle, operation): pass

def failing_lock(handle, operation): raise OSError(37, "no locks here")

if locks != "locks":
    import fcntl
    fcntl.flock = {"no-locks": no_lock, "failing-locks": failing_lock}[locks]
module.LOCK_SECONDS = float(patience)
store, fetcher = module.Store(Path(root)), Fetcher()
try:
    manifest = store.manifest(url, sha256, fetcher)
    urls = manifest.artifacts[0].resolved_urls(url)
    installed = store.install(manifest.artifacts[0], urls, fetcher)
except LoaderError as error:
    sys.exit(error.render())
print(installed.folder)
"""


def command(root: Path, url: str, sha256: str, locks: str = "locks", wait: float = 60) -> list[str]:
    """Return an installation's argv; it prints the folder."""
    return [sys.executable, "-c", PROGRAM, str(SPACES), str(root), url, sha256, locks, str(wait)]


def is_traceable() -> bool:
    """Whether ``strace`` is here and may trace."""
    if shutil.which("strace") is None:
        return False
    argv = ["strace", "-qq", "-o", "/dev/null", "true"]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0
