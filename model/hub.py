"""Where a model lies: a folder, or a repository of the Hugging Face hub, downloaded into its cache.

From a repository come safetensors, config.json and the tokenizer's files, by name: no code, no
pickle. What the hub answers, its list of files first of all, is data to be checked. This is the
only file that imports huggingface_hub, and it does so when a repository is asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from model.config import UnsupportedModelError
from model.weight_files import (
    INDEX_NAME,
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    listed,
    pickle_reason,
    read_index,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import tqdm

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
# What a tokenizer folder may hold; `tokenizer.json` makes it one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_OFFLINE = "HF_HUB_OFFLINE is set"
_ANSWER_SECONDS = 15.0  # for the first question to the hub; without an answer the cache is used
_NAME = re.compile(r"\w([\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class CheckpointDownloadError(Exception):
    """A checkpoint can be had neither from the hub nor from its cache."""


@dataclass(frozen=True, kw_only=True)
class HubId:
    """The name of a repository on the hub, and which state of it is meant.

    Attributes:
        repo_id: `ORG/NAME`.
        revision: a branch, a tag or a commit hash; None for the branch `main`.
    """

    repo_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `ORG/NAME` or `ORG/NAME@REVISION`.

        Raises:
            ValueError: `text` is neither; the message says what is wrong with it.
        """
        repo_id, at, revision = text.partition("@")
        names = repo_id.split("/")
        if len(names) != 2 or not all(map(_NAME.fullmatch, names)):
            raise ValueError(
                "a hub id is ORG/NAME or ORG/NAME@REVISION, where names are letters, digits, `_`, "
                "`-` and `.`"
            )
        # The rules of huggingface_hub.utils.validate_repo_id.
        if "--" in repo_id or ".." in repo_id or repo_id.endswith(".git") or len(repo_id) > 96:
            raise ValueError(
                "a hub id has at most 96 characters, no `--`, no `..` and no `.git` at its end"
            )
        # A revision becomes a path in the cache, so it must not lead out of it.
        if at and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise ValueError(
                f"the revision {revision!r} after the @ is no branch, tag or commit hash"
            )
        return cls(repo_id=repo_id, revision=revision or None)

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


@dataclass(frozen=True, kw_only=True)
class ModelLocation:
    """Where the files of a checkpoint are, and where they are from.

    Attributes:
        folder: holds them; files of the hub's cache are symbolic links.
        repo_id: the repository on the hub, None for a folder of the user's.
        revision: its commit, 40 hexadecimal digits, None for a folder.
    """

    folder: Path
    repo_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """A short name: the repository's without its owner, or the folder's last part."""
        if self.repo_id is not None:
            return self.repo_id.partition("/")[2]
        return self.folder.resolve().name


def resolve_model(model_argument: str, *, quiet: bool = False) -> ModelLocation:
    """Find what `--model` names, downloading it when it is a repository of the hub.

    A folder (or file) of that name wins. For the repository beside such a folder, name a revision.

    Args:
        model_argument: a path, or `ORG/NAME[@REVISION]`.
        quiet: show no progress.

    Raises:
        FileNotFoundError: there is no such folder, and it cannot be a hub id.
        CheckpointDownloadError: as `download_checkpoint`.
        UnsupportedModelError: likewise.
    """
    if Path(model_argument).exists():
        return ModelLocation(folder=Path(model_argument))
    try:
        hub_id = HubId.parse(model_argument)
    except ValueError as error:
        raise FileNotFoundError(
            f"there is no folder {model_argument}, and it is no hub id either: {error}"
        ) from error
    return download_checkpoint(hub_id, quiet=quiet)


def download_checkpoint(
    hub_id: HubId,
    *,
    quiet: bool = False,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> ModelLocation:
    """Download what a checkpoint needs of a repository, unless the cache has it.

    Without a network, what the cache holds of that revision is used, and a warning says so.

    Args:
        hub_id: the repository and revision.
        quiet: show no progress.
        cache_dir: the hub's cache, as huggingface_hub lays it out; None for the user's.
        endpoint: address of the hub, None for the one that huggingface_hub is set to.

    Returns:
        The folder of that commit in the cache, and the commit.

    Raises:
        CheckpointDownloadError: no such repository or revision, no access to it, no network and
            not all of it in the cache, a download that broke off, or huggingface_hub is missing.
        UnsupportedModelError: the repository holds no config.json or no safetensors of a model.
    """
    try:
        import httpx2  # noqa: F401
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise CheckpointDownloadError(
            f"there is no folder {hub_id}, and to download {hub_id} from the hub the package "
            f"{error.name} is missing: pip install 'doge-tensorrt[hub]'"
        ) from error
    download = _Download(hub_id, huggingface_hub.HfApi(endpoint=endpoint), cache_dir, quiet)
    try:
        commit, names = download.ask_hub()
    except _UnreachableError as error:
        folder = download.find_in_cache(str(error))
        logger.warning("the hub cannot be reached (%s): %s is taken from its cache", error, hub_id)
    else:
        folder = download.fetch(commit, names)
    if hub_id.revision != folder.name:
        logger.info("%s is commit %s; name it after an @ to pin it", hub_id, folder.name)
    return ModelLocation(folder=folder, repo_id=hub_id.repo_id, revision=folder.name)


class _UnreachableError(Exception):
    """The hub gives no answer that counts; the message is the reason in a few words."""


class _Download:
    """One repository at one revision, through huggingface_hub."""

    def __init__(self, hub_id: HubId, api: HfApi, cache_dir: Path | None, quiet: bool) -> None:
        self._hub_id = hub_id
        self._api = api
        self._cache_dir = cache_dir
        self._bar = _hidden_bar() if quiet else None

    def ask_hub(self) -> tuple[str, list[str]]:
        """The commit of the revision, and the paths of all files of the repository.

        Raises:
            _UnreachableError: no network, or an answer that is not the hub's.
            CheckpointDownloadError: the hub refuses.
        """
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            info = self._api.model_info(
                self._hub_id.repo_id, revision=self._hub_id.revision, timeout=_ANSWER_SECONDS
            )
        except OfflineModeIsEnabled as error:
            raise _UnreachableError(_OFFLINE) from error
        except httpx2.TransportError as error:
            raise _UnreachableError(str(error) or type(error).__name__) from error
        except HfHubHTTPError as error:
            if error.response.status_code >= 500:
                raise _UnreachableError(f"it answered {error.response.status_code}") from error
            raise self._refusal(error) from error
        except (ValueError, KeyError, TypeError) as error:  # the log-in page of a hotel, say
            raise _UnreachableError(f"{self._api.endpoint} does not answer as a hub") from error
        if not _COMMIT.fullmatch(str(info.sha)):
            raise _UnreachableError(f"{self._api.endpoint} gives no commit")
        return str(info.sha), [file.rfilename for file in info.siblings or []]

    def fetch(self, commit: str, names: Collection[str]) -> Path:
        """Download the wanted ones of the files `names`; the folder that holds them.

        Raises:
            CheckpointDownloadError: the hub refuses, or the download broke off.
            UnsupportedModelError: the wanted files are not among them.
        """
        weights = _weights_among(names, self._hub_id)
        with self._broken_off():
            if weights == INDEX_NAME:
                index = self._api.hf_hub_download(
                    self._hub_id.repo_id,
                    INDEX_NAME,
                    revision=commit,
                    cache_dir=self._cache_dir,
                    tqdm_class=self._bar,
                )
                wanted = (INDEX_NAME, *_shards(Path(index), self._hub_id))
                if missing := sorted(set(wanted) - set(names)):
                    raise UnsupportedModelError(
                        f"{self._hub_id} lacks {listed(missing)} that its {INDEX_NAME} names"
                    )
            else:
                wanted = (weights,)
            # By its own revision, not by `commit`: that is what makes the cache remember which
            # commit the revision was, for a time without a network.
            folder = Path(
                self._api.snapshot_download(
                    self._hub_id.repo_id,
                    revision=self._hub_id.revision,
                    cache_dir=self._cache_dir,
                    allow_patterns=[CONFIG_NAME, *TOKENIZER_FILES, *wanted],
                    tqdm_class=self._bar,
                )
            )
        if folder.name != commit:
            raise CheckpointDownloadError(
                f"{self._hub_id} changed from commit {commit} to {folder.name} during the "
                "download; run again"
            )
        # What the cache has of a repository stands in for what the hub refuses to send.
        if missing := self._missing_from(folder):
            raise CheckpointDownloadError(
                f"the hub does not send {listed(missing)} of {self._hub_id}: see whether its page "
                f"{self._api.endpoint}/{self._hub_id.repo_id} gives access to files, and run again"
            )
        return folder

    def find_in_cache(self, reason: str) -> Path:
        """The folder of the cache that holds the checkpoint whole.

        Raises:
            CheckpointDownloadError: there is none, or something is missing from it.
            UnsupportedModelError: its index of shards cannot be read.
        """
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        unreachable = f"the hub cannot be reached ({reason}) and"
        again = "run again with a network"
        if reason == _OFFLINE:
            again = "unset HF_HUB_OFFLINE and run again"
        try:
            folder = Path(
                self._api.snapshot_download(
                    self._hub_id.repo_id,
                    revision=self._hub_id.revision,
                    cache_dir=self._cache_dir,
                    local_files_only=True,
                    allow_patterns=[CONFIG_NAME, *TOKENIZER_FILES],
                )
            )
        except IncompleteSnapshotError as error:
            raise CheckpointDownloadError(
                f"{unreachable} its cache holds only a part of {self._hub_id}: the download broke "
                f"off, {again}"
            ) from error
        except LocalEntryNotFoundError as error:
            raise CheckpointDownloadError(
                f"{unreachable} its cache does not hold {self._hub_id}; {again}, or name a folder "
                "(there is none of that name)"
            ) from error
        if missing := self._missing_from(folder):
            raise CheckpointDownloadError(
                f"{unreachable} its cache lacks {listed(missing)} of {self._hub_id}; {again}"
            )
        return folder

    def _missing_from(self, folder: Path) -> list[str]:
        """What a checkpoint needs and `folder` lacks."""
        if not _COMMIT.fullmatch(folder.name):
            return [CONFIG_NAME, WEIGHTS_NAME]
        wanted = [CONFIG_NAME]
        if (folder / INDEX_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
            wanted += _shards(folder / INDEX_NAME, self._hub_id)
        else:
            wanted.append(WEIGHTS_NAME)
        return [name for name in wanted if not (folder / name).is_file()]

    @contextmanager
    def _broken_off(self) -> Iterator[None]:
        """Turn what huggingface_hub raises during a download into errors of ours.

        What the system raises, a full disk for instance, stays as it is.
        """
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, XetDownloadError

        try:
            yield
        except HfHubHTTPError as error:
            raise self._refusal(error) from error
        except (httpx2.TransportError, XetDownloadError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if isinstance(error.__cause__, HfHubHTTPError):
                raise self._refusal(error.__cause__) from error
            raise CheckpointDownloadError(
                f"the download of {self._hub_id} broke off ({_first_line(str(error))}); run again, "
                "files that have arrived are kept"
            ) from error

    def _refusal(self, error: HfHubHTTPError) -> CheckpointDownloadError:
        """What the hub's refusal means and what to do about it."""
        from huggingface_hub.errors import (
            DisabledRepoError,
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        repo_id, page = self._hub_id.repo_id, f"{self._api.endpoint}/{self._hub_id.repo_id}"
        log_in = "log in with `hf auth login` or set HF_TOKEN"
        status = error.response.status_code
        told = _first_line(error.server_message or "")
        if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too, so it comes first
            text = f"{repo_id} is gated: accept its conditions on {page}, then {log_in}"
        elif isinstance(error, RepositoryNotFoundError):
            text = (
                f"the hub has no model {repo_id}, or it is private, and there is no folder of that "
                f"name: check the spelling; if it is private, {log_in}"
            )
        elif isinstance(error, RevisionNotFoundError):
            text = (
                f"{repo_id} has no revision {self._hub_id.revision or 'main'}: expected a branch, "
                f"a tag or a commit hash of 40 digits, see {page}/commits/main"
            )
        elif isinstance(error, DisabledRepoError):
            text = f"{repo_id} has been disabled on the hub"
        elif status == 401:
            text = f"the hub wants an access token that it knows for {repo_id} ({told}): {log_in}"
        else:
            text = f"the hub refuses {repo_id} with status {status} ({told}), see {page}"
        return CheckpointDownloadError(text)


def _weights_among(names: Collection[str], hub_id: HubId) -> str:
    """The file to read weights from, one file or the index of several."""
    for name in (WEIGHTS_NAME, INDEX_NAME):
        if name in names:
            if CONFIG_NAME not in names:
                raise UnsupportedModelError(f"{hub_id} has no {CONFIG_NAME}")
            return name
    hints = []
    if pickles := sorted(name for name in names if name.endswith(PICKLE_SUFFIXES)):
        hints.append(f"; it has {pickle_reason(pickles)}")
    if others := sorted(name for name in names if name.endswith(".safetensors")):
        hints.append(f"; {listed(others)} is not named as a whole model")
    raise UnsupportedModelError(
        f"{hub_id} has no {WEIGHTS_NAME} and no {INDEX_NAME}{''.join(hints)}"
    )


def _shards(index: Path, hub_id: HubId) -> list[str]:
    """The weight files that an index names."""
    return sorted(set(read_index(index, f"{INDEX_NAME} of {hub_id}").values()))


def _first_line(text: str) -> str:
    """The first line that says something, at most 200 characters."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return lines[0][:200] if lines else "no reason given"


def _hidden_bar() -> type[tqdm]:
    """A progress bar that shows nothing; huggingface_hub's own switch is for the whole process."""
    from huggingface_hub.utils.tqdm import tqdm

    class HiddenBar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **(settings | {"disable": True}))  # type: ignore[no-untyped-call]

    return HiddenBar
