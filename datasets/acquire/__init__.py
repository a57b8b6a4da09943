"""Getting and examining datasets. Nothing that trains or evaluates imports this package."""
