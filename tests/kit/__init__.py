"""What tests share: the tiny model with its run and bundle, parts of a loop, hard rows, hostile input."""
