Feature: Placement
  The machine has two simulated GPUs: GPU 0 of 24 GiB and GPU 1 of 12 GiB.

  Scenario: A pool never spills over to a GPU it was not given
    Given a pool "first" that starts with the daemon
    And it may use GPU 1 alone
    And it needs 8 GiB of GPU memory
    And a pool "second" that starts on demand
    And it may use GPU 1 alone
    And it needs 8 GiB of GPU memory
    When the daemon runs
    And pool "first" is ready
    Then its engine sees GPU 1 alone
    When client "ann" asks for a lease of "second"
    Then pool "second" waits for GPU memory
    And 8 GiB are reserved on GPU 1
    And nothing is reserved on GPU 0

  Scenario: Without a mask the GPU with room is taken
    Given a pool "large" that starts with the daemon
    And it needs 16 GiB of GPU memory
    When the daemon runs
    And pool "large" is ready
    Then its engine sees GPU 0 alone

  Scenario: A GPU that is not there is refused before anything starts
    Given no pool at all
    When the daemon runs
    And the operator declares pool "chat" on GPU 7
    Then it is refused with "MASK_INVALID"
    And there is no pool "chat"

  Scenario: With a split over unequal GPUs the smallest caps the KV cache of each
    Given a real model that is served over both GPUs in equal parts
    When the daemon runs
    And the operator plans a context of 1000000 tokens
    Then it does not fit, because of GPU 1
    When the operator plans the context that is proposed instead
    Then it fits
    And no GPU holds more KV cache than GPU 1 has room for
    And 1024 tokens more would not fit
