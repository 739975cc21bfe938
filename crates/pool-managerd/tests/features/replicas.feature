Feature: Replicas
  A pool of several replicas is ready as long as one of them is, and uses them evenly.

  Background:
    Given a pool "chat" that starts with the daemon
    And it has 2 replicas
    And it takes 2 requests at a time
    And it pauses between 10m and 20m before a restart
    When the daemon runs
    And all replicas of "chat" are ready

  Scenario: Leases go to the replica with the least to do
    When client "ann" gets a lease of "chat"
    And client "bob" gets a lease of "chat"
    Then "ann" and "bob" are on different replicas
    When client "cid" gets a lease of "chat"
    And client "dot" gets a lease of "chat"
    Then "cid" and "dot" are on different replicas
    And a lease is refused with "POOL_SATURATED" and says when to come back

  Scenario: A client that prefers a replica gets it if it is free
    When client "ann" gets a lease of "chat" on replica "r1"
    And client "bob" gets a lease of "chat" on replica "r1"
    Then "ann" and "bob" are on the same replica

  Scenario: When one replica dies the pool serves on, and says so
    When the engine of replica "r0" is killed
    Then 1 of 2 replicas is ready
    And pool "chat" is ready
    And its last error is "crash"
    When client "ann" gets a lease of "chat"
    Then "ann" is on replica "r1"
