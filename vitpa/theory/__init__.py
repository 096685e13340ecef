"""The paper's theory as experiments: data, model and what becomes of both under gradient descent; torch in float64 only."""
