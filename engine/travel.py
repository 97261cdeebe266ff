"""What travels: files of a run go to a private hub repository while it works, and from there to another machine."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from engine import hub
from helpers import RecipeError

# Names without a folder, so that no file leaves the folder that it is brought to. A pickle of weights is never brought.
NAME = re.compile(r"(?!pytorch_model|adapter_model\.bin)\w[\w.-]*")
PATIENCE = 600  # seconds that the next upload, or the end of the run, waits for one that may never end
PAUSE = 20  # seconds before the last try: a hub that was busy may answer again


class Courier:
    """Carries the files of one run to a hub repository and back.

    They lie in a folder of their own, named after the `run` (a hash of all that decides it), on the branch recipe-WHAT.
    So no other run is in their way, and what is pushed at the end (branch main) is not touched. Each upload is one
    commit: a machine that is lost in the middle of it leaves the files of the commit before.
    """

    def __init__(self, hub_repo: str, token: str, what: str, run: str):
        self.api, self.hub_repo, self.what = HfApi(token=token), hub_repo, what
        self.branch, self.folder = f"recipe-{what}", f"{what}/{run[:16]}/"
        self.newest: Mapping[str, Path | bytes] | None = None
        self.arrived: Mapping[str, Path | bytes] | None = None
        self.thread: threading.Thread | None = None

    def open(self) -> list[str]:
        """The names of the files that were sent before. The repository is created where there is none, private.

        RecipeError if it is public or cannot be reached: what lies there might be newer than what is here.
        """
        with hub.one_line(f"{self.what} cannot be kept in {self.hub_repo}"):
            hub.open_private(self.api, self.hub_repo, "model")
            self.api.create_branch(self.hub_repo, branch=self.branch, exist_ok=True)
            names = self.look()
        if not names and self.others:
            print(
                f"{self.hub_repo} holds {self.what} of other runs only, with other inputs or settings: they stay there"
            )
        return names

    def look(self) -> list[str]:
        """The names of the files that lie there now, at the commit `self.commit`; RecipeError if it is public."""
        info = self.api.repo_info(self.hub_repo, revision=self.branch, timeout=20)
        hub.refuse_public(self.hub_repo, info.private)
        self.commit = hub.check_commit(self.hub_repo, info.sha)
        paths = [file.rfilename for file in info.siblings or ()]
        self.others = any(path.startswith(f"{self.what}/") for path in paths)
        return [path.removeprefix(self.folder) for path in paths if path.startswith(self.folder)]

    def bring(self, names: Iterable[str], place: Path) -> None:
        """Fetch files that were sent before, at the commit of the last look, into the folder `place`."""
        with hub.one_line(f"{self.what} cannot be fetched from {self.hub_repo}"):
            for name in filter(NAME.fullmatch, names):
                fetched = self.api.hf_hub_download(
                    self.hub_repo, self.folder + name, revision=self.commit, local_dir=place / ".part"
                )
                Path(fetched).replace(place / name)
        shutil.rmtree(place / ".part", ignore_errors=True)

    def send(self, files: Mapping[str, Path | bytes]) -> None:
        """Begin to upload files, by name, in the place of those that were sent before, and return at once.

        Of several that wait only the newest are sent. What fails is said in one line, and stops nothing.
        """
        self._start(files, "the run goes on, and they are sent again with the next ones or at its end")

    def wait(self) -> None:
        """Return at the end of a run when what was sent has arrived, and at the latest after PATIENCE seconds.

        What failed is tried once more. If it fails again, a line says what another machine lacks.
        """
        if not self.thread:
            return
        self.thread.join(PATIENCE)
        if self.newest is not self.arrived and not self.thread.is_alive():
            time.sleep(PAUSE)
            lacking = f"the newest {self.what} are on this machine only: another one would go on from older ones"
            self._start(self.newest, f"{lacking}, or begin anew")
            self.thread.join(PATIENCE)
        if self.thread.is_alive():
            print(f"{self.what} are still on their way to {self.hub_repo}")

    def _start(self, files: Mapping[str, Path | bytes], if_it_fails: str) -> None:
        self.newest = files
        self.thread = threading.Thread(target=self._deliver, args=(files, self.thread, if_it_fails), daemon=True)
        self.thread.start()

    def _deliver(self, files: Mapping[str, Path | bytes], before: threading.Thread | None, if_it_fails: str) -> None:
        if before:
            before.join(PATIENCE)
        if files is self.newest:
            try:
                self._upload(files)
                self.arrived = files
            except Exception as error:
                if not isinstance(error, RecipeError):
                    error = hub.failure(f"{self.what} cannot be sent to {self.hub_repo}", error)
                print(f"{error}; {if_it_fails}")

    def _upload(self, files: Mapping[str, Path | bytes]) -> None:
        gone = sorted(set(self.look()) - files.keys())
        changes = [CommitOperationDelete(self.folder + name) for name in gone]
        changes += [CommitOperationAdd(self.folder + name, content) for name, content in files.items()]
        with without_progress():
            # With its parent named, an upload that hung does not arrive after a newer one and replace it.
            self.api.create_commit(
                self.hub_repo, changes, commit_message=self.what, revision=self.branch, parent_commit=self.commit
            )
        with suppress(Exception):  # older checkpoints would fill the storage; if they stay this time, nothing is lost
            self.api.super_squash_history(self.hub_repo, branch=self.branch)


@contextmanager
def arrivals(folder: Path) -> Iterator[Path]:
    """An empty place in `folder` for what is brought, until it is looked at; afterwards it is gone."""
    place = folder / ".brought"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def without_progress() -> Iterator[None]:
    """No bars of the hub's client within: they would break through the bar of the notebook."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
