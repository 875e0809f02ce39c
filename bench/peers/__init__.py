"""What people would pick instead, each as a well-behaved process of its own, tuned as its documentation says."""
