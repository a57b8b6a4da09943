"""Methods that change what the text tower reads."""
