"""Which device a command computes on: what ``--device`` may say."""

from __future__ import annotations

from mplug_core.device import check_device, choose_device

__all__ = ["check_device", "choose_device"]
