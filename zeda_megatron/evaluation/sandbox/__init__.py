"""Running code that a model wrote: no network, no files but its own folder, bounded in all it uses."""
