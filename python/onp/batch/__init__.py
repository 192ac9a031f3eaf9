"""Many checkpoints: ``onp batch``. Jobs go to child processes, what they come to into a journal."""
