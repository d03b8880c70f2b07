"""Push a saved model to the Hugging Face Hub, under the user's own login."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import LayerShapError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What the Hub puts into every new repository.
HUB_OWN_FILES = (".gitattributes",)
OFFLINE = (
    "The Hugging Face Hub cannot be reached; check the connection and try again. The model stays "
    "saved on this machine."
)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    progress: Callable[[str, float | None], None] | None = None,
) -> str:
    """Upload a saved model's folder to a new repository; return its address.

    The token is that of the user's own login (`hf auth login` or HF_TOKEN); it is never asked for.
    Nothing is overwritten: of the repositories that exist already only an empty one of the same
    visibility is used, such as an upload that was cut off leaves behind.

    Args:
        folder: a folder written by `save_pruned` or `save_healed`.
        repo_id: owner/name, or a name under the user's own account.
        private: whether only the owner can see the new repository.

    Raises:
        LayerShapError: there is no such folder, nobody is logged in, the name is not valid or
            taken, the login may not write there, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    folder, repo_id = Path(folder).expanduser(), repo_id.strip()
    report = progress or (lambda stage, fraction: None)
    if not (folder / "config.json").is_file():
        raise LayerShapError(f"There is no saved model in {folder}; save one first.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LayerShapError(
            f"{repo_id[:100]!r} is not a name that the Hub takes; use owner/name with letters, "
            "digits, dots, dashes and underscores, at most 96 characters."
        ) from error
    token = get_token()
    if token is None:
        raise LayerShapError(
            "Nobody is logged in to the Hugging Face Hub on this machine; run `hf auth login` in a "
            "terminal (or set HF_TOKEN) and try again."
        )
    api = HfApi(token=token)
    try:
        report(f"Making the repository {repo_id}", None)
        repo_id = _new_repository(api, repo_id, private)
        report(f"Uploading to {repo_id}", None)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload pruned model",
        )
    except HfHubHTTPError as error:
        raise LayerShapError(_refusal(error, repo_id)) from error
    except (HTTPError, OSError) as error:
        raise LayerShapError(OFFLINE) from error
    report("Pushed", 1.0)
    return f"{api.endpoint}/{repo_id}"


def _new_repository(api: HfApi, repo_id: str, private: bool) -> str:
    """Make a repository, or take one that is empty; return its full name.

    Raises:
        LayerShapError: it exists and holds something, or has the other visibility.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        made = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=False)
        return made.repo_id
    except HfHubHTTPError as error:
        if _status(error) != 409:
            raise
        found = api.model_info(repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}")
        files = {sibling.rfilename for sibling in found.siblings or ()}
        if files <= set(HUB_OWN_FILES) and bool(found.private) == private:
            return found.id
        raise LayerShapError(
            f"{found.id} exists already on the Hub; choose another name."
        ) from error


def _refusal(error: Exception, repo_id: str) -> str:
    status = _status(error)
    if status == 401:
        return (
            "The Hub does not accept this machine's login; run `hf auth login` again with a token "
            "that may write."
        )
    if status in (403, 404):
        return (
            f"This machine's login may not write to {repo_id}; choose a name under your own "
            "account, or log in with a token that may write (`hf auth login`)."
        )
    if status is None or status >= 500:
        return OFFLINE
    said = getattr(error, "server_message", None) or str(error)
    reason = (said.strip().splitlines() or ["no reason given"])[0][:200]
    return f"The Hub refused {repo_id} ({reason}); choose another name or try again later."


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
