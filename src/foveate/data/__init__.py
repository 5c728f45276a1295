"""What is looked at: embedded sets, readers of the usual layouts, and the images made from them on the fly."""
