Feature: Pools on demand
  A pool that starts on demand rests until somebody asks, and again when nobody has asked for a while.

  Scenario: The first lease starts the pool, and all who ask wait for one start
    Given a pool "chat" that starts on demand
    And its engine loads for 300ms
    When the daemon runs
    Then pool "chat" rests
    When client "ann" asks for a lease of "chat"
    And client "bob" asks for a lease of "chat"
    Then client "ann" gets the lease
    And client "bob" gets the lease
    And it is served by engine number 1
    And 2 leases are held

  Scenario: Whoever does not wait is told to come back, and finds the pool ready later
    Given a pool "chat" that starts on demand
    When the daemon runs
    Then a lease is refused with "POOL_UNREADY" and says when to come back
    And pool "chat" is ready

  Scenario: A start that fails is told to all who wait
    Given a pool "chat" that starts on demand
    And its engine answers as another model
    And it pauses between 10m and 20m before a restart
    When the daemon runs
    And client "ann" asks for a lease of "chat"
    And client "bob" asks for a lease of "chat"
    Then client "ann" is refused with "POOL_UNREADY"
    And client "bob" is refused with "POOL_UNREADY"

  Scenario: A pool that nobody uses stops, and the next lease starts it again
    Given a pool "chat" that starts on demand
    And it stops when nobody used it for 300ms
    And engines may be stopped as soon as they are ready
    When the daemon runs
    And client "ann" asks for a lease of "chat"
    Then client "ann" gets the lease
    When client "ann" releases the lease
    Then pool "chat" rests
    And it is not on hold
    When client "bob" asks for a lease of "chat"
    Then client "bob" gets the lease
    And it is served by engine number 2

  Scenario: A pinned pool stays though nobody uses it
    Given a pool "pinned" that starts on demand
    And it stops when nobody used it for 300ms
    And it is pinned
    And a pool "free" that starts on demand
    And it stops when nobody used it for 300ms
    And engines may be stopped as soon as they are ready
    When the daemon runs
    And client "ann" asks for a lease of "pinned"
    Then client "ann" gets the lease
    When client "ann" releases the lease
    And client "bob" asks for a lease of "free"
    Then client "bob" gets the lease
    When client "bob" releases the lease
    Then pool "free" rests
    And pool "pinned" is ready
    And it is served by engine number 1

  Scenario: A pinned pool does not give way to another one
    Given a pool "pinned" that starts on demand
    And it is pinned
    And it may use GPU 1 alone
    And it needs 8 GiB of GPU memory
    And a pool "other" that starts on demand
    And it may use GPU 1 alone
    And it needs 8 GiB of GPU memory
    And engines may be stopped as soon as they are ready
    When the daemon runs
    And client "ann" asks for a lease of "pinned"
    Then client "ann" gets the lease
    When client "ann" releases the lease
    And client "bob" asks for a lease of "other"
    Then pool "other" waits for GPU memory
    And its reason names "pinned"
    And pool "pinned" is ready

  Scenario: An idle pool gives way to one that is asked for
    Given a pool "idle" that starts on demand
    And it may use GPU 1 alone
    And it needs 8 GiB of GPU memory
    And a pool "other" that starts on demand
    And it may use GPU 1 alone
    And it needs 8 GiB of GPU memory
    And engines may be stopped as soon as they are ready
    When the daemon runs
    And client "ann" asks for a lease of "idle"
    Then client "ann" gets the lease
    When client "ann" releases the lease
    And client "bob" asks for a lease of "other"
    Then client "bob" gets the lease
    And pool "idle" rests
    And 8 GiB are reserved on GPU 1
