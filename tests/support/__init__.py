"""What several test files share: fabricated data and weights, a local server, calls of the program."""
