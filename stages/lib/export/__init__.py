"""The formats a trained model leaves in, one module a family, and the papers that go with them."""
