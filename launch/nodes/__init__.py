"""Starting a run on one or many nodes, by whatever a place has for that: `vlm launch`."""
