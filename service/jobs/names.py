"""Names and places derived from a job: model ids, file ids, folders. Nothing here touches the disk."""

from __future__ import annotations

from pathlib import Path

from service.db.tables import Job

ORGANISATION = "local"


def model_id(job: Job, *, whole: bool = False) -> str:
    """Id of the fine-tuned model, in OpenAI's form.

    Args:
        job: a fine-tuning job.
        whole: with all 24 characters of the job's own, where another job's model has the short id already.

    Returns:
        ``ft:<base>:local:<suffix>:<last 8 characters of the job's id>``; without suffix its place is empty.
    """
    return f"ft:{job.model}:{ORGANISATION}:{job.suffix or ''}:{own_id(job, '') if whole else job.id[-8:]}"


def checkpoint_id(job: Job, step: int, *, whole: bool = False) -> str:
    """Id of a checkpoint as a model.

    Args:
        job: a fine-tuning job.
        step: optimizer steps done.
        whole: as in ``model_id``.

    Returns:
        ``<model id>:ckpt-step-<step>``.
    """
    return f"{model_id(job, whole=whole)}:ckpt-step-{step}"


def own_id(job: Job, prefix: str) -> str:
    """Id of the one thing of a kind that a job makes: the same at every attempt, so that a retry overwrites it.

    Args:
        job: the job.
        prefix: with its separator, such as ``file-`` or ``vec_``.

    Returns:
        The prefix and the job's own 24 characters.
    """
    return prefix + job.id.rpartition("-")[2]


def job_directory(home: Path, job_id: str) -> Path:
    """Folder of a job's run.

    Args:
        home: the data folder.
        job_id: the job.

    Returns:
        ``<home>/jobs/<job id>``.
    """
    return home / "jobs" / job_id


def checkpoints_directory(home: Path, job_id: str) -> Path:
    """Folder of a job's checkpoints, ``step-...`` each.

    Args:
        home: the data folder.
        job_id: the job.

    Returns:
        ``<home>/jobs/<job id>/checkpoints``.
    """
    return job_directory(home, job_id) / "checkpoints"


def start_directory(home: Path, job_id: str) -> Path:
    """The earlier adapter that a job goes on with, its own copy.

    Args:
        home: the data folder.
        job_id: the job.

    Returns:
        ``<home>/jobs/<job id>/start``.
    """
    return job_directory(home, job_id) / "start"


def base_directory(home: Path, job_id: str) -> Path:
    """The whole weights of an earlier result that a job trains on instead of a pulled base, its own copy.

    Args:
        home: the data folder.
        job_id: the job.

    Returns:
        ``<home>/jobs/<job id>/base``.
    """
    return job_directory(home, job_id) / "base"


def validation_directory(home: Path, job_id: str) -> Path:
    """Folder of the process that checks a job's files.

    Args:
        home: the data folder.
        job_id: the job.

    Returns:
        ``<home>/jobs/<job id>/validation``.
    """
    return job_directory(home, job_id) / "validation"


def file_path(home: Path, file_id: str) -> Path:
    """Bytes of a file.

    Args:
        home: the data folder.
        file_id: the file.

    Returns:
        ``<home>/files/<file id>``.
    """
    return home / "files" / file_id
