"""What every room stands on: files, locks, devices, progress, settings, text, journals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system.lazy import lazy_names

if TYPE_CHECKING:
    from d3pack.system.devices import resolve_device
    from d3pack.system.extras import missing_extra, require
    from d3pack.system.files import (
        digest,
        disk_full_as_error,
        remove_leftovers,
        replace_file,
        replace_folder,
        reserve,
        write_json,
        write_text,
        writing,
    )
    from d3pack.system.journal import Arrays, Checkpoint, Journal, JournalError
    from d3pack.system.locks import Lock, lock, locked
    from d3pack.system.progress import (
        Counter,
        Events,
        Listener,
        StatusLine,
        json_lines,
        live_view,
        log_file,
        progress_bar,
    )
    from d3pack.system.settings import (
        REQUIRED,
        Option,
        SettingError,
        all_plain,
        argument,
        check,
        from_plain,
        json_schema,
        nested,
        option,
        options_of,
        plain,
    )
    from d3pack.system.text import (
        clock,
        count,
        duration,
        first_line,
        parse_duration,
        parse_size,
        printable,
        size,
    )

__all__ = [
    "REQUIRED",
    "Arrays",
    "Checkpoint",
    "Counter",
    "Events",
    "Journal",
    "JournalError",
    "Listener",
    "Lock",
    "Option",
    "SettingError",
    "StatusLine",
    "all_plain",
    "argument",
    "check",
    "clock",
    "count",
    "digest",
    "disk_full_as_error",
    "duration",
    "first_line",
    "from_plain",
    "json_lines",
    "json_schema",
    "lazy_names",
    "live_view",
    "lock",
    "locked",
    "log_file",
    "missing_extra",
    "nested",
    "option",
    "options_of",
    "parse_duration",
    "parse_size",
    "plain",
    "printable",
    "progress_bar",
    "remove_leftovers",
    "replace_file",
    "replace_folder",
    "require",
    "reserve",
    "resolve_device",
    "size",
    "write_json",
    "write_text",
    "writing",
]

__getattr__ = lazy_names(
    __name__,
    {
        "devices": ["resolve_device"],
        "extras": ["missing_extra", "require"],
        "files": [
            "digest",
            "disk_full_as_error",
            "remove_leftovers",
            "replace_file",
            "replace_folder",
            "reserve",
            "write_json",
            "write_text",
            "writing",
        ],
        "journal": ["Arrays", "Checkpoint", "Journal", "JournalError"],
        "locks": ["Lock", "lock", "locked"],
        "progress": [
            "Counter",
            "Events",
            "Listener",
            "StatusLine",
            "json_lines",
            "live_view",
            "log_file",
            "progress_bar",
        ],
        "settings": [
            "REQUIRED",
            "Option",
            "SettingError",
            "all_plain",
            "argument",
            "check",
            "from_plain",
            "json_schema",
            "nested",
            "option",
            "options_of",
            "plain",
        ],
        "text": [
            "clock",
            "count",
            "duration",
            "first_line",
            "parse_duration",
            "parse_size",
            "printable",
            "size",
        ],
    },
)
