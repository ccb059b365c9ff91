"""Damaged inputs by the thousand: every format that a user may bring is read, or refused with a message."""
