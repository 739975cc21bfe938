Feature: Engines that fail
  An engine is ready when it has proved that it serves. One that fails says why, is started again after pauses that
  grow, and is left alone for a while when it keeps failing.

  Scenario: A preload that fails leaves the pool unready, and the pool says why
    Given a pool "chat" that starts with the daemon
    And its model file is missing
    When the daemon runs
    And the operator preloads "chat"
    Then the operation fails
    And it is not ready
    And its last error is "artifact"
    And no engine was ever started for it

  Scenario: An engine that serves another model never becomes ready
    Given a pool "chat" that starts with the daemon
    And its engine answers as another model
    When the daemon runs
    Then pool "chat" fails to start without ever being ready
    And its last error is "wrong_server"

  Scenario: An engine that fails at first is started again until it serves
    Given a pool "chat" that starts with the daemon
    And its engine fails to start 2 times
    And it pauses between 10ms and 20ms before a restart
    When the daemon runs
    Then pool "chat" is ready
    And it is served by engine number 3
    And it was restarted 2 times

  Scenario: A driver error takes the pool out of service until its pause is over
    Given a pool "chat" that starts with the daemon
    And its engine meets a CUDA error at the first request
    And it pauses between 10m and 20m before a restart
    When the daemon runs
    And pool "chat" is ready
    And a client uses its engine
    Then pool "chat" waits to be restarted
    And it is not ready
    And its last error is "driver_error"
    And a lease is refused with "POOL_UNREADY" and says when to come back

  Scenario: After a driver error the engine is restarted without anybody's help
    Given a pool "chat" that starts with the daemon
    And its engine meets a CUDA error at the first request
    And it pauses between 10ms and 20ms before a restart
    When the daemon runs
    And pool "chat" is ready
    And a client uses its engine
    Then it is served by engine number 2
    And it was restarted 1 time
    And the log says that its engine met a driver error

  Scenario: A restart storm is ended by the breaker
    Given a pool "chat" that starts with the daemon
    And its engine crashes in every start
    And it pauses between 10ms and 20ms before a restart
    And its breaker opens after 3 failures in a row, for 5m
    When the daemon runs
    Then the breaker of pool "chat" opens
    And 3 engines were started for it
    And a lease is refused with "POOL_UNAVAILABLE" and says when to come back
    When the operator resets the breaker of "chat"
    Then more than 3 engines were started for it

  Scenario: Health tells of an engine that does not answer, and of one that does again
    Given a pool "chat" that starts with the daemon
    And its engine is checked every 50ms, and given up after 1000 failed checks
    When the daemon runs
    And pool "chat" is ready
    Then its health is live and ready, with 0 failed checks
    When its engine is frozen
    Then its health is live and not ready, with at least 2 failed checks
    And a lease is refused with "POOL_UNREADY" and says when to come back
    When its engine goes on
    Then pool "chat" is ready
    And it has the same engine as before
    And its health is live and ready, with 0 failed checks
