"""What a training is put together from: data, networks, teachers' answers, all by its options."""
