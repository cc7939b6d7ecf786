"""From raw video to a training set: cut, score, filter, deduplicate and caption, each from manifest to manifest."""
