"""Postpones imports that workers do not need; the server of workers imports it before Lightning."""

from sglight.compat.postponed import postpone

postpone()
